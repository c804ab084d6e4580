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
        "--data", metavar="DIR", help="the folder of pictures that the run was on, if it has moved"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the MNIST files lie (default: where the run found them)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from convext.errors import UserError
    from convext.lab.report import write_report
    from convext.mnist.data import load_data
    from convext.mnist.run_folder import load_trained

    folder = Path(args.run_folder).expanduser()
    if folder.is_file():
        raise UserError(f"RUN must be a folder, got the file {folder}")
    settings, _ = load_trained(folder, option="RUN")
    pictures = {"image_size": settings.image_size, "colour": settings.colour}
    dataset = load_data(
        settings.data if args.data is None else args.data,
        args.data_dir or settings.data_dir,
        **({} if settings.content is None else pictures),
    )
    try:
        print(write_report(folder, dataset))
    except ValueError as error:
        raise UserError(f"--data: {error}") from error
    except OSError as error:
        raise UserError(f"RUN {folder}: {error.strerror or error}") from error
