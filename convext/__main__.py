"""The command line: `python -m convext COMMAND`, or `convext COMMAND`.

A command is a function that adds its parser: write it, and list it in COMMANDS. What a
command needs is imported when it runs, so that `--help` is quick and an extra that is not
installed stops only the commands that use it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from convext.errors import UserError

# The module that an import misses -> the extra that brings it.
EXTRAS = {
    "filelock": "train",
    "lightning": "train",
    "matplotlib": "plot",
    "pooch": "train",
    "requests": "train",
    "rich": "train",
    "sklearn": "digits",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage too."""

    def error(self, message: str) -> None:
        self.exit(2, None if _is_silent() else f"{self.prog}: {message} (see {self.prog} --help)\n")


def _train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train the lesson's CNN on MNIST",
        description="Trains the lesson's CNN on MNIST, or where MNIST can't be had on "
        "scikit-learn's digits. Writes last.ckpt and metrics.json into the run's folder.",
    )
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", help="(default: 1; digits: 10)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per step, of all processes together (default: 512; digits: 64)",
    )
    add("--lr", type=float, metavar="RATE", help="highest rate of the 1cycle (default: 0.06)")
    add("--seed", type=int, metavar="N", help="of weights and order of images (default: 0)")
    add(
        "--data",
        choices=("mnist", "digits", "auto"),
        help="auto is MNIST where it can be had, else digits (default: auto)",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="where the MNIST files lie (default: $CONVEXT_DATA, else the user's cache, "
        "into which they are downloaded)",
    )
    add("--layers", choices=("convext", "torch"), help="whose layers (default: convext)")
    add("--algorithm", metavar="NAME", help="of the convolutions (default: auto)")
    add(
        "--device",
        choices=("cpu", "cuda", "auto"),
        help="auto is cuda where torch finds a GPU and convext has kernels for it (default: auto)",
    )
    add(
        "--devices",
        type=int,
        metavar="N",
        help="processes on this machine, each with its part of every batch; on convext's layers "
        "they train as one would (default: 1, or those that torchrun started)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="of all processes together, at least one each (default: torch's own choice)",
    )
    add("--out", metavar="DIR", help="the run's folder (default: a new one in runs/)")
    add(
        "--resume",
        metavar="RUN",
        help="go on with this run (folder or checkpoint) up to --epochs; --device, --devices "
        "and --threads may differ, the other options are the run's own",
    )

    def run(args: argparse.Namespace) -> None:
        from convext.mnist.train import Options, train

        names = Options.__dataclass_fields__
        train(Options(**{name: getattr(args, name) for name in names}))

    parser.set_defaults(run=run)


def _bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time our kernels beside PyTorch's",
        description="Times our kernels and PyTorch's in turn, in one process, and prints a "
        "Markdown table as it goes, then every goal with its figure. Names are separated by "
        "spaces; 'all' stands for all of them.",
    )
    add = parser.add_argument
    several = {"nargs": "+", "default": [], "metavar": "NAME"}
    add(
        "--groups",
        **several,
        help="mnist, resnet50, vgg16, mobilenet, batchnorm, step, block, overhead (default: "
        "these), epoch (one of `convext train`)",
    )
    add("--passes", **several, help="forward, grad_input, grad_weight, eval, ... (default: all)")
    add("--layouts", **several, help="NCHW, channels_last (default: both)")
    add("--dtypes", **several, help="float32, float64, bfloat16, float16 (default: float32)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda measures on a GPU beside cuDNN, and knows tf32 as a dtype (default: cpu)",
    )
    add("--threads", nargs="+", default=[], type=int, metavar="N", help="(default: 1)")
    add("--algorithms", **several, help="to time besides auto (default: none)")
    add("--match", default="", metavar="TEXT", help="only layers whose name has it: '3x3 s2'")
    add("--batch", type=int, metavar="N", help="images (default: each group's own)")
    add("--rounds", type=int, metavar="N", help="samples of each call (default: 15; quick: 9)")
    add(
        "--quick",
        action="store_true",
        help="few layers of the large networks, one image, short samples: below three minutes",
    )
    add(
        "--regret",
        action="store_true",
        help="time every algorithm, and say how far auto is from the best",
    )
    add("--report", metavar="DIR", help="write report.md, report.json and plots into this folder")

    def run(args: argparse.Namespace) -> None:
        from convext.bench.command import bench

        bench(args)

    parser.set_defaults(run=run)


COMMANDS: tuple[Callable[[argparse._SubParsersAction], None], ...] = (_train, _bench)


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
