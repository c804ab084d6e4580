"""`convext report`: writes the report of a run anew."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's report.html anew",
        description="Writes report.html into the folder of a run of convext train, from the files "
        "that are there: also while it trains, and after it was interrupted.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the MNIST files lie (default: $CONVEXT_DATA, else the user's cache)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from convext.errors import UserError
    from convext.lab.report import write_report
    from convext.mnist.data import load_data
    from convext.mnist.run_folder import load_checkpoint

    folder = Path(args.run_folder).expanduser()
    if folder.is_file():
        raise UserError(f"RUN must be a folder, got the file {folder}")
    _, checkpoint = load_checkpoint(folder, option="RUN")
    dataset = load_data(checkpoint["convext"]["data"], args.data_dir)
    try:
        print(write_report(folder, dataset))
    except OSError as error:
        raise UserError(f"RUN {folder}: {error.strerror or error}") from error
