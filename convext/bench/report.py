"""Rows as Markdown, live and afterwards, and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from convext.bench.cases import AUTO, WINOGRAD, is_stock, is_winograd
from convext.bench.goals import NOISE, REGRET, Verdict, auto_regret, judge
from convext.bench.machine import Peaks
from convext.bench.results import BETTER, ON_GPU, SAME, Row, geometric_mean, regret
from convext.bench.timing import spread

LEGEND = (
    "µs per call: medians of samples taken in turn, ± half the distance between the quartiles; "
    "PyTorch's better layout in bold. In brackets, how many times as fast as PyTorch ours is: "
    "against its better layout and, where that is another, against the same layout. Rate and share "
    "of the peak are those of our first column, in its better layout; a multiplication and an "
    "addition are two operations, those with padding are not counted, and the peak is whichever "
    "binds of the two measured: fused multiply-adds, or a copy of as many bytes as go in and out."
)
NOISY = 0.15  # a spread above which a figure is doubtful
METHOD = (
    "All calls of a line are warmed up and then sampled in turn in one process, both layouts of "
    "both sides in every round, in an order that is another each round; a short call is repeated "
    "within its sample, after one that is not timed and leaves its operands in the caches. A ratio "
    "is the median over rounds of the quotients within a round. Convolutions and batch norms are "
    "called as functions without gradients or as ops of one backward pass, the same for both; "
    "blocks and steps go through autograd."
)


# --------------------------------------------------------------------------------------------------
# Tables of times


class Table:
    """A table for one group, dtype and number of threads, line by line."""

    def __init__(self, names: Sequence[str], layouts: Sequence[str]) -> None:
        self.names = names  # of ours
        self.layouts = layouts

    def header(self) -> str:
        ours = [f"{label(name)} {layout}" for name in self.names for layout in self.layouts]
        titles = [f"torch {layout}" for layout in self.layouts] + ours + ["rate", "of peak"]
        return (
            _line(["layer", "pass", *titles]) + "\n" + _line(["---"] * 2 + ["---:"] * len(titles))
        )

    def line(self, row: Row) -> str:
        best = row.torch_layout()
        stock = [
            f"**{_time(row.torch[layout])}**" if layout == best else _time(row.torch[layout])
            for layout in self.layouts
            if layout in row.torch
        ]
        stock += [""] * (len(self.layouts) - len(stock))
        ours = [self._cell(row, name, layout) for name in self.names for layout in self.layouts]
        rate, share = row.rate(), row.share()
        count = f" ({row.count} times)" if row.count > 1 else ""
        return _line(
            [
                *(row.layer + count, row.what, *stock, *ours),
                f"{rate[0] / 1e9:.3g} G{rate[1]}" if rate else "",
                f"{share:.0%}" if share is not None else "",
            ]
        )

    @staticmethod
    def _cell(row: Row, name: str, layout: str) -> str:
        if layout not in row.ours.get(name, {}):
            return "can't" if name in row.declined else ""
        better, same = (f"{row.ratio(name, layout, against):.2f}" for against in (BETTER, SAME))
        ratios = better if layout == row.torch_layout() else f"{better}, {same}"
        return f"{_time(row.ours[name][layout])} ({ratios})"


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """A heading and a table for each group, dtype and number of threads."""
    for title, members in groupby(rows, key=heading):
        members = list(members)
        table = Table(our_names(members), layouts(members))
        yield f"### {title}\n\n{table.header()}\n" + "\n".join(map(table.line, members)) + "\n"


def heading(row: Row) -> str:
    """Of the table that a row stands in."""
    batch = f", batch {row.batch}" if row.batch is not None else ""
    return f"{row.group}{batch}, {row.dtype}, {_threads(row.threads)}"


def label(name: str) -> str:
    """What our call of that name is in a title."""
    return {AUTO: "ours", WINOGRAD: "Winograd allowed"}.get(name, name)


def our_names(rows: Iterable[Row]) -> list[str]:
    """Names of our calls, in the order of their first appearance, then Winograd's and PyTorch's."""
    names = dict.fromkeys(name for row in rows for name in (*row.ours, *row.declined))
    return sorted(names, key=lambda name: (is_stock(name), name == WINOGRAD))


def layouts(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(layout for row in rows for layout in row.torch))


# --------------------------------------------------------------------------------------------------
# What the rows come to


def summary(rows: Sequence[Row]) -> str:
    """Geometric means by group, part and pass, against PyTorch's better layout, and the least."""
    columns = layouts(rows)
    titles = ["group", "pass", "dtype", "threads", "ours", "cases", *columns]
    lines = [_line(titles), _line(["---"] * 5 + ["---:"] * (1 + len(columns)))]
    collected: dict[tuple, list[Row]] = {}
    for row in rows:
        title = f"{row.group}, {row.part}" if row.part else row.group
        key = (title, row.what, row.dtype, row.threads or "GPU")
        collected.setdefault(key, []).append(row)
    for key, members in collected.items():
        for name in our_names(members):
            held = [row for row in members if name in row.ours]
            cells = []
            for layout in columns:
                ratios = [r.ratio(name, layout) for r in held if layout in r.ours[name]]
                mean = f"{geometric_mean(ratios):.2f}" if ratios else ""
                cells.append(f"{mean} (least {min(ratios):.2f})" if len(ratios) > 1 else mean)
            if held:
                lines.append(_line([*key, label(name), len(held), *cells]))
    return "\n".join(lines) + "\n"


def networks(rows: Sequence[Row]) -> str:
    """All convolutions of a network, each as often as it has them, against PyTorch's better layout
    of each.
    """
    lines = [
        _line(["network", "pass", "dtype", "threads", "torch, ms", "ours, ms", "ratio"]),
        _line(["---"] * 4 + ["---:"] * 3),
    ]
    counted = [row for row in rows if row.flops and row.group != "mnist"]
    found = dict.fromkeys((r.group, r.what, r.dtype, r.threads) for r in counted)
    for key in found:
        members = [r for r in counted if (r.group, r.what, r.dtype, r.threads) == key]
        stock = sum(r.count * statistics.median(r.torch[r.torch_layout()]) for r in members)
        for name in (AUTO, WINOGRAD):
            if not any(name in r.ours for r in members):
                continue
            ours = sum(
                r.count * r.seconds(n, r.layout(n))
                for r in members
                for n in (name if name in r.ours else AUTO,)
            )
            title = key[0] if name == AUTO else f"{key[0]}, {label(name)}"
            times = [f"{1e3 * stock:.3g}", f"{1e3 * ours:.3g}", f"{stock / ours:.2f}"]
            lines.append(_line([title, *key[1:3], key[3] or "GPU", *times]))
    return "\n".join(lines) + "\n" if found else ""


def goals(verdicts: Iterable[Verdict]) -> str:
    """Every goal with its figures."""
    lines = [
        _line(["goal", "pass", "at least", "threads", "cases", "figures", "verdict"]),
        _line(["---", "---", "---:", "---:", "---:", "---", "---"]),
    ]
    for v in verdicts:
        against = "" if v.goal.against == BETTER else f" against {v.goal.against}"
        part = f", {v.goal.parts[0]}" if v.goal.groups == ("step",) else ""
        least = f"{v.goal.at_least:g}" + (f", each {v.goal.each:g}" if v.goal.each else "")
        more = dict.fromkeys(v.figures, "")
        if v.held_to_one_thread:
            least = "as 1 thread"
            more = {layout: f" (1 thread: {v.needed[layout]:.2f})" for layout in v.figures}
        elif v.goal.each:
            more = {layout: f" (least {v.worst[layout]:.2f})" for layout in v.figures}
        figures = "; ".join(f"{at} {figure:.2f}{more[at]}" for at, figure in v.figures.items())
        cells = [f"{v.goal.title}{part}{against}", v.goal.what, least, v.threads, v.cases]
        lines.append(_line([*cells, figures, v.verdict]))
    return "\n".join(lines) + "\n"


def regrets(rows: Sequence[Row]) -> str:
    """How far auto is from the best algorithm, case by case; empty where only auto was timed."""
    names = [n for n in our_names(rows) if n not in (AUTO, WINOGRAD) and not is_stock(n)]
    chosen = [row for row in rows if row.chosen and len(set(names) & set(row.ours)) > 1]
    if not chosen:
        return ""
    titles = ["layer", "pass", "threads", "layout", "auto took", "auto", *names, "regret"]
    lines = [_line(titles), _line(["---"] * 5 + ["---:"] * (len(names) + 2))]
    for row in chosen:
        usual = [name for name in names if not is_winograd(name)]
        for layout in row.ours[AUTO]:
            cells = [
                _time(row.ours[name][layout]) if layout in row.ours.get(name, {}) else "can't"
                for name in names
            ]
            lost = regret(row, layout, usual)
            lines.append(
                _line(
                    [
                        *(row.layer, row.what, row.threads, layout, row.chosen.get(layout, "")),
                        *(_time(row.ours[AUTO][layout]), *cells),
                        f"{lost - 1:.0%}" if lost is not None else "",
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def regret_goal(rows: Sequence[Row]) -> str:
    """The goal for auto's choice, in words."""
    figure = auto_regret(rows)
    if math.isnan(figure):
        return "Regret of auto: not measured (--regret does)."
    verdict = "met" if figure <= REGRET else "missed"
    text = f"Regret of auto: {figure - 1:.1%} in the geometric mean; at most {REGRET - 1:.0%}: "
    allowed = auto_regret(rows, allowing_winograd=True)
    more = "" if math.isnan(allowed) else f" With Winograd allowed: {allowed - 1:.1%}."
    groups = {row.group: auto_regret(r for r in rows if r.group == row.group) for row in rows}
    each = ", ".join(
        f"{group} {lost - 1:.1%}" for group, lost in groups.items() if not math.isnan(lost)
    )
    return f"{text}{verdict} ({each}).{more}"


# --------------------------------------------------------------------------------------------------
# The whole report


def machine_text(machine: dict[str, object]) -> str:
    """The machine and the software."""
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    return (
        f"- {machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable"
        + (f", {caches}" if caches else "")
        + f"\n- convext {machine['convext']} ({machine['isa']}, compiler {machine['compiler']}), "
        f"torch {machine['torch']} (oneDNN {machine['onednn']}), Python {machine['python']}, "
        f"{machine['system']}" + (f"\n- {_gpu_text(machine)}" if "gpu" in machine else "")
    )


def _gpu_text(machine: dict[str, object]) -> str:
    return (
        f"{machine['gpu']}, {machine['multiprocessors']} multiprocessors, L2 "
        f"{machine['l2_bytes'] / 2**20:.0f} MiB, driver {machine['driver']}, CUDA "
        f"{machine['cuda']}, cuDNN {machine['cudnn']} with benchmark=True (its choices with "
        f"deterministic=True in columns of their own)"
    )


def peaks_text(dtype: str, threads: int, peaks: Peaks) -> str:
    """The two limits, as measured."""
    fastest, largest = max(peaks.copies.values()), peaks.copies[max(peaks.copies)]
    return (
        f"- measured peaks, {dtype}, {_threads(threads)}: {peaks.flops / 1e9:.0f} GFLOP/s; copies "
        f"of {fastest / 1e9:.0f} GB/s in cache, {largest / 1e9:.0f} GB/s in memory (read and "
        "written)"
    )


_GOALS = (
    "Geometric means of how many times as fast as PyTorch's better layout (or the one that is "
    "named) ours is in each layout, float32. More than one thread: no worse than one thread, "
    f"within {NOISE:.0%}. Where no Winograd algorithm can do a case, auto's own figure counts.\n"
)


def markdown(
    command: str,
    machine: dict[str, object],
    peaks: dict[tuple[str, int], Peaks],
    rows: Sequence[Row],
    left_out: int = 0,
) -> str:
    """Machine, goals, summaries and tables: a whole report."""
    parts = [
        "# convext bench\n",
        f"`{command}`\n",
        "\n".join([machine_text(machine), *(peaks_text(*key, peak) for key, peak in peaks.items())])
        + "\n",
    ]
    if not rows or any(row.threads != ON_GPU for row in rows):
        parts += ["## Goals\n", _GOALS, goals(judge(rows))]
    parts += [regret_goal(rows) + "\n", "## Means\n", summary(rows)]
    if whole := networks(rows):
        parts += ["## Networks\n", whole]
    parts += ["## Times\n", f"{METHOD}\n", f"{LEGEND}\n", *tables(rows)]
    if lost := regrets(rows):
        parts += ["## Auto's choices\n", lost]
    if left_out:
        parts.append(left_out_text(left_out) + "\n")
    if noise := noise_text(rows):
        parts.insert(3, noise + "\n")
    return "\n".join(parts)


def noise_text(rows: Sequence[Row]) -> str:
    """A warning where the machine was busy with something else; else empty."""
    samples = [
        [*row.torch.values(), *(times for ours in row.ours.values() for times in ours.values())]
        for row in rows
    ]
    noisy = sum(max(map(spread, of_row)) > NOISY for of_row in samples)
    if noisy <= len(rows) / 10:
        return ""
    return (
        f"In {noisy} of {len(rows)} lines some times spread by more than {NOISY:.0%}: something "
        "else kept this machine busy, and these lines are not to be trusted."
    )


def left_out_text(count: int) -> str:
    return f"{count} cases were left out, for --quick was out of time."


def as_json(
    command: str,
    created: str,
    machine: dict[str, object],
    peaks: dict[tuple[str, int], Peaks],
    rows: Sequence[Row],
    left_out: int = 0,
) -> dict[str, object]:
    """The same, with every sample, for programs."""
    return {
        "command": command,
        "created": created,
        "machine": machine,
        "peaks": [
            {
                "dtype": dtype,
                "threads": threads,
                "flops": peak.flops,
                "copies": [[size, speed] for size, speed in peak.copies.items()],
            }
            for (dtype, threads), peak in peaks.items()
        ],
        "goals": [{**asdict(v), "met_in": v.met_in, "verdict": v.verdict} for v in judge(rows)],
        "regret": {
            "auto": auto_regret(rows),
            "winograd_allowed": auto_regret(rows, allowing_winograd=True),
            "at_most": REGRET,
        },
        "left_out": left_out,
        "rows": [row.as_json() for row in rows],
    }


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _time(samples: list[float]) -> str:
    return f"{microseconds(statistics.median(samples))} ±{spread(samples):.0%}"


def microseconds(seconds: float) -> str:
    """With about three digits."""
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _threads(count: int) -> str:
    if count == ON_GPU:
        return "GPU"
    return f"{count} thread{'s' if count > 1 else ''}"
