"""`convext lab NAME`: the experiments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convext.errors import UserError

if TYPE_CHECKING:
    from convext.lab.experiment import Experiment
    from convext.lab.trial import Run


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "lab",
        help="run an experiment: one thing changed, several seeds",
        description="Trains the lesson's CNN in several variants, each from several seeds, and "
        "says what the lesson claims and what was measured. Writes DIR/NAME.json, NAME.png and "
        "NAME.md.",
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which experiment; --list names them")
    add("--list", action="store_true", help="name the experiments and leave")
    add("--seeds", type=int, default=3, metavar="N", help="of each variant (default: 3)")
    add("--epochs", type=int, metavar="N", help="(default: 1; digits: 10)")
    add(
        "--data",
        choices=("mnist", "digits", "auto"),
        default="auto",
        help="auto is MNIST where it can be had, else digits (default: auto)",
    )
    add("--data-dir", metavar="DIR", help="where the MNIST files lie")
    add("--train-images", type=int, metavar="N", help="train on the first N only (default: all)")
    add("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    add("--out", default="runs/lab", metavar="DIR", help="(default: runs/lab)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the experiment, writes its files and prints its table."""
    from convext.lab.experiments import EXPERIMENTS

    if args.list:
        width = max(map(len, EXPERIMENTS))
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:{width}}  {experiment.question}")
        return
    names = ", ".join(EXPERIMENTS)
    if args.name is None:
        raise UserError(f"NAME must be one of {names}")
    if args.name not in EXPERIMENTS:
        raise UserError(f"NAME must be one of {names}, got {args.name}")
    for option in ("seeds", "epochs", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, got {value}")
    _run(EXPERIMENTS[args.name], args)


def _run(experiment: Experiment, args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401  where it is missing, that is said before the work

    from convext.commands.arguments import show, write
    from convext.lab.experiment import run_experiment
    from convext.lab.experiment_table import below, markdown
    from convext.mnist.callbacks import InterruptError, interruptible
    from convext.mnist.data import load_data
    from convext.mnist.run_folder import writable_folder

    folder = writable_folder(Path(args.out).expanduser())
    dataset = load_data(args.data, args.data_dir)
    if args.train_images is not None and not 2 <= args.train_images <= len(dataset.train):
        raise UserError(
            f"--train-images must be from 2 to {len(dataset.train)}, got {args.train_images}"
        )
    if dataset.note:
        print(dataset.note, file=sys.stderr)

    def tell(run: Run) -> None:
        found = run.figures
        print(
            f"seed {run.seed}, {run.variant}: {found['accuracy']:.2%}, "
            f"{found['train_seconds']:.2f} s",
            file=sys.stderr,
            flush=True,
        )

    with interruptible():
        try:
            results = run_experiment(
                experiment,
                dataset,
                seeds=args.seeds,
                epochs=args.epochs,
                train_images=args.train_images,
                threads=args.threads,
                told=tell,
            )
        except InterruptError:
            raise KeyboardInterrupt("Interrupted: nothing was written") from None
    if sys.stdout.isatty():
        show(results, *(f"{paragraph}\n" for paragraph in below(results)))
    else:  # without a width of its own, where rich would take 80 columns
        print(f"{results}\n")
    picture = f"{experiment.name}.png"
    write(folder / f"{experiment.name}.json", results.save)
    write(folder / picture, lambda path: results.plot().savefig(path))
    write(
        folder / f"{experiment.name}.md",
        lambda path: path.write_text(markdown(results, picture), encoding="utf-8"),
    )
