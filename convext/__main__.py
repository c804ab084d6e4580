"""The command line: `python -m convext COMMAND`, or `convext COMMAND`.

A command is a module of convext/commands with a function, `add`, that adds its parser: write it,
and list it in COMMANDS. What a command needs is imported when it runs, so that `--help` is quick
and an extra that is not installed stops only the commands that use it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from convext.commands import (
    bench,
    features,
    filter,
    lab,
    lr_find,
    matrix,
    predict,
    receptive_field,
    report,
    show,
    summary,
    trace,
    train,
)
from convext.errors import UserError

# The module that an import misses -> the extra that brings it.
EXTRAS = {
    "PIL": "plot",
    "cv2": "features",
    "filelock": "train",
    "lightning": "train",
    "matplotlib": "plot",
    "onnx": "export",
    "onnxscript": "export",
    "openpyxl": "xlsx",
    "pooch": "train",
    "requests": "train",
    "rich": "train",
    "skimage": "features",
    "sklearn": "digits",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage too."""

    def error(self, message: str) -> None:
        self.exit(2, None if _is_silent() else f"{self.prog}: {message} (see {self.prog} --help)\n")


COMMANDS: tuple[Callable[[argparse._SubParsersAction], None], ...] = (
    train.add,
    predict.add,
    report.add,
    lr_find.add,
    lab.add,
    bench.add,
    summary.add,
    receptive_field.add,
    matrix.add,
    filter.add,
    trace.add,
    show.add,
    features.add,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0; 2 for a mistake, 1 for another process that failed, 130 for Ctrl-C.
    """
    parser = _Parser(prog="convext", description="Convolution you can hold in your hand.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else list(argv)
    try:
        args.run(args)
    except UserError as error:
        return _complain(args.command, str(error), error.status)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        advice = f"needs {error.name}: pip install 'convext[{extra}]'"
        return _complain(args.command, advice, 2)
    except KeyboardInterrupt as error:
        return _complain(args.command, str(error) or "Interrupted", 130)
    return 0


def _complain(command: str, message: str, status: int) -> int:
    if not _is_silent():
        print(f"convext {command}: {message}", file=sys.stderr)
    return status


def _is_silent() -> bool:
    """Of torchrun's processes, which do all the same, the first one speaks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"


if __name__ == "__main__":
    sys.exit(main())
