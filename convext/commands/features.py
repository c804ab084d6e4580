"""`convext features`: features made by hand beside those that a CNN learns."""

from __future__ import annotations

import argparse
import importlib

from convext.commands.arguments import add_out, show, write
from convext.errors import UserError

TRAIN_IMAGES = 5_000  # of MNIST's 60,000, so that it takes less than a minute


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "features",
        help="compare HOG, SIFT and ORB with a CNN",
        description="Describes digits by their pixels, HOG, SIFT and ORB, lets a linear support "
        "vector machine learn from each, trains the lesson's CNN on the same images, and shows "
        "accuracy and time.",
    )
    add = parser.add_argument
    add(
        "--data",
        choices=("mnist", "digits", "auto"),
        default="auto",
        help="auto is MNIST where it can be had, else digits (default: auto)",
    )
    add("--data-dir", metavar="DIR", help="where the MNIST files lie")
    add(
        "--train-images",
        type=int,
        metavar="N",
        help=f"learn from the first N (default: {TRAIN_IMAGES}, or all where there are fewer)",
    )
    add("--epochs", type=int, default=5, metavar="N", help="of the CNN (default: 5)")
    add("--threads", type=int, default=1, metavar="N", help="to compute with (default: 1)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    for option in ("train_images", "epochs", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    from convext.inspection.features import LIBRARIES, compare
    from convext.mnist.data import Split, load_data

    # One that is missing is found before the data are looked for.
    for library in (*LIBRARIES, *(["matplotlib"] if args.out else [])):
        importlib.import_module(library)
    data = load_data(args.data, args.data_dir)
    if data.note:
        print(data.note)
    count = args.train_images or min(TRAIN_IMAGES, len(data.train))
    if count > len(data.train):
        raise UserError(
            f"--train-images must be at most {len(data.train)}, of {data.name}, got {count}"
        )
    train = Split(data.train.images[:count], data.train.labels[:count])
    if len(train.labels.unique()) < 2:
        raise UserError(f"--train-images must take in at least two classes, got {count}")
    print(f"data  {data.name}: the first {count:,} of {len(data.train):,} images to learn from")
    comparison = compare(train, data.valid, epochs=args.epochs, threads=args.threads)
    show(comparison)
    if args.out:
        write(args.out, lambda path: comparison.plot().savefig(path))
