"""`convext train`: the options of a run."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train the lesson's CNN on MNIST",
        description="Trains the lesson's CNN on MNIST, or where MNIST can't be had on "
        "scikit-learn's digits, or on pictures of your own. Writes last.ckpt and metrics.json into "
        "the run's folder, and at the end report.html (for a run that was interrupted, see convext "
        "report).",
    )
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", help="(default: 1; digits, a folder: 10)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per step, of all processes together (default: 512; digits: 64; a folder: "
        "64, or 8 to 32 where there are few)",
    )
    add("--lr", type=float, metavar="RATE", help="highest rate of the 1cycle (default: 0.06)")
    add("--seed", type=int, metavar="N", help="of weights and order of images (default: 0)")
    add(
        "--data",
        metavar="DATA",
        help="mnist, digits, auto (MNIST where it can be had, else digits) or a folder of pictures "
        "with a sub-folder for each class; where it holds train and valid, these hold the "
        "classes, else a fifth is kept for validation (default: auto)",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="where the MNIST files lie (default: $CONVEXT_DATA, else the user's cache, "
        "into which they are downloaded)",
    )
    add(
        "--image-size",
        type=_image_size,
        metavar="N",
        help="what the pictures of a folder are brought to: N or HxW, at most 32 (default: 28)",
    )
    add(
        "--colour",
        action=argparse.BooleanOptionalAction,
        help="whether the pictures of a folder have three channels (default: if any has colour)",
    )
    add(
        "--augment",
        action="store_true",
        default=None,
        help="turn and shift each image that is trained on a little, at random",
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
    add(
        "--stats",
        choices=("histograms", "numbers", "off"),
        help="of each layer's activations in each batch; numbers are mean, standard deviation and "
        "share near zero (default: histograms)",
    )
    add(
        "--no-report",
        dest="report",
        action="store_false",
        help="write no report.html at the end, which takes some seconds",
    )
    add("--out", metavar="DIR", help="the run's folder (default: a new one in runs/)")
    add(
        "--resume",
        metavar="RUN",
        help="go on with this run (folder or checkpoint) up to --epochs, also where it was killed; "
        "--device, --devices, --threads and --save-every may differ, the other options are the "
        "run's own",
    )
    add(
        "--save-every",
        type=float,
        metavar="SECONDS",
        help="write last.ckpt so often within an epoch, and whenever one ends; inf: only then "
        "(default: 2)",
    )

    def run(args: argparse.Namespace) -> None:
        from convext.mnist.train import Options, train

        names = Options.__dataclass_fields__
        train(Options(**{name: getattr(args, name) for name in names}))

    parser.set_defaults(run=run)


def _image_size(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"must be sizes like 28 or 24x32, got {text!r}")
    return int(sizes[0]), int(sizes[-1])
