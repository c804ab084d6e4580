"""`convext bench`: measures a selection, shows it as it comes, and writes the report."""

from __future__ import annotations

import shlex
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path

from convext.bench import gpu, report
from convext.bench.goals import judge
from convext.bench.machine import describe
from convext.bench.results import Row
from convext.bench.suite import QUICK, Run, Selection
from convext.bench.timing import Effort
from convext.mnist.run_folder import writable_folder, write_json

JSON, MARKDOWN = "report.json", "report.md"


def bench(args: Namespace) -> None:
    """Runs the command with its parsed options."""
    folder = None
    if args.report:
        # Now, so that what is missing costs no measurement.
        from convext.bench import plots

        folder = writable_folder(Path(args.report).expanduser(), "--report")
    usual = gpu.EFFORT if args.device == "cuda" else QUICK if args.quick else Effort()
    selection = Selection(
        groups=args.groups,
        passes=args.passes,
        layouts=args.layouts,
        dtypes=args.dtypes,
        threads=args.threads,
        algorithms=["all"] if args.regret else args.algorithms,
        match=args.match,
        batch=args.batch,
        quick=args.quick,
        device=args.device,
        effort=usual if args.rounds is None else Effort(args.rounds, usual.sample, usual.seconds),
    ).checked()
    command = shlex.join(["convext", *args.given])
    machine = describe(args.device)
    run = Run(selection)
    rows: list[Row] = []
    interrupted = False
    try:
        _show(run, machine, rows)
    except KeyboardInterrupt:
        interrupted = True
    print()
    if judged := [verdict for verdict in judge(rows) if verdict.cases]:
        print(report.goals(judged))
    print(report.regret_goal(rows))
    if noise := report.noise_text(rows):
        print(noise)
    if run.left_out:
        print(report.left_out_text(run.left_out))
    if folder:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        (folder / MARKDOWN).write_text(
            report.markdown(command, machine, run.peaks, rows, run.left_out), encoding="utf-8"
        )
        content = report.as_json(command, created, machine, run.peaks, rows, run.left_out)
        write_json(folder / JSON, content)
        saved = plots.save_all(folder, rows, run.peaks)
        print(f"\n{folder}: {', '.join([MARKDOWN, JSON, *(path.name for path in saved)])}")
    if interrupted:
        raise KeyboardInterrupt(f"Interrupted after {len(rows)} rows, which are above")


def _show(run: Run, machine: dict[str, object], rows: list[Row]) -> None:
    """Prints a line as soon as it is measured, and appends to rows."""
    names: dict[str, dict[str, None]] = {}
    for case in run.selection.cases():
        names.setdefault(case.group, {}).update(dict.fromkeys(run.names(case)))
    shown, told = None, set()
    table = None
    for row in run:
        if not rows:
            print(f"{report.machine_text(machine)}\n\n{report.LEGEND}")
        measured = row.dtype, row.threads
        if measured in run.peaks and measured not in told:
            told.add(measured)
            print(f"\n{report.peaks_text(*measured, run.peaks[measured])}")
        if report.heading(row) != shown:
            shown = report.heading(row)
            table = report.Table(list(names.get(row.group, row.ours)), list(row.torch))
            print(f"\n### {shown}\n\n{table.header()}")
        print(table.line(row), flush=True)
        rows.append(row)
