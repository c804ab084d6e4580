"""`convext filter`: a classic kernel on a picture."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from convext.commands import arguments
from convext.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from convext.inspection.kernels import Filter


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "filter",
        help="apply classic kernels (edges, Sobel, blur, ...) to a picture",
        description="Applies kernels to a picture by our conv2d, and says for each what came of "
        "it; --list shows the kernels, --out draws before and after, --at writes out one pixel.",
    )
    add = parser.add_argument
    add(
        "picture",
        nargs="?",
        metavar="IMAGE",
        help="a file, or one of scikit-image's samples: astronaut, camera, coins, ... (default: a "
        "digit of MNIST, see --digit)",
    )
    add(
        "--kernel",
        nargs="+",
        default=["top-edge"],
        metavar="NAME",
        help="of --list; each is applied to the picture (default: top-edge)",
    )
    add("--list", action="store_true", help="show the kernels, and do nothing else")
    add("--size", type=int, metavar="N", help="of box and gaussian, N x N (default: 3 and 5)")
    add("--sigma", type=float, metavar="S", help="of gaussian, in pixels (default: 1)")
    add(
        "--colour",
        "--color",
        choices=("sum", "each", "grey"),
        default="sum",
        help="of a colour picture: the sum over red, green and blue, each by itself, or its "
        "luminance (default: sum)",
    )
    add(
        "--padding",
        choices=("valid", "zeros", "reflect", "replicate", "circular"),
        default="valid",
        help="what lies beyond the border; valid: nothing, and the output is smaller "
        "(default: valid)",
    )
    add("--at", type=arguments.numbers, metavar="ROW,COL", help="write out what is done there")
    arguments.add_digit(parser)
    arguments.add_out(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from convext.inspection.kernels import FILTERS

    if args.list:
        arguments.show(FILTERS)
        return
    filters = _filters(args)
    if args.at is not None and len(args.at) != 2:
        raise UserError(f"--at must be ROW,COL, got {','.join(map(str, args.at))}")
    image, name = _image(args)
    if args.colour == "grey" and len(image) == 1:
        raise UserError(f"--colour grey is of a colour picture, and {name} has one channel")
    try:
        _report(args, image, name, filters)
    except ValueError as error:
        raise UserError(str(error)) from error


def _filters(args: argparse.Namespace) -> list[Filter]:
    from convext.inspection.kernels import FILTERS, box, gaussian

    for name in args.kernel:
        if name not in FILTERS:
            raise UserError(f"--kernel must be of {', '.join(FILTERS)}; got {name!r}")
    if args.size is not None and not {"box", "gaussian"} & set(args.kernel):
        raise UserError("--size is of the kernels box and gaussian")
    if args.sigma is not None and "gaussian" not in args.kernel:
        raise UserError("--sigma is of the kernel gaussian")
    try:
        made = {
            "box": box(3 if args.size is None else args.size),
            "gaussian": gaussian(
                5 if args.size is None else args.size, 1.0 if args.sigma is None else args.sigma
            ),
        }
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return [made.get(name, FILTERS[name]) for name in args.kernel]


def _image(args: argparse.Namespace) -> tuple[Tensor, str]:
    """The picture, (C, H, W), and what to call it."""
    from convext.inspection.pictures import SAMPLES, read_picture, sample

    if args.picture is None:
        return arguments.load_digit(args)[0], f"digit {args.digit}"
    if args.picture in SAMPLES:
        return sample(args.picture), args.picture
    try:
        return read_picture(args.picture), args.picture
    except ValueError as error:
        raise UserError(f"IMAGE {error}") from error
    except OSError as error:
        raise UserError(
            f"IMAGE {args.picture}: {error.strerror or error}; samples are {', '.join(SAMPLES)}"
        ) from error


def _report(args: argparse.Namespace, image: Tensor, name: str, filters: list[Filter]) -> None:
    from convext.inspection.filter_plot import plot_filters
    from convext.inspection.filters import apply_filter

    outputs = [apply_filter(image, found, args.colour, args.padding) for found in filters]
    written_out = [] if args.at is None else _at(args, image, filters)
    print(f"{name}: {_range(image)}")
    for found, output in zip(filters, outputs, strict=True):
        print(f"{found.name}: {_range(output)}")
    for text in written_out:
        print(f"\n{text}")
    if args.out is not None:
        is_digit = args.picture is None
        figure = plot_filters(image, filters, args.colour, args.padding, args.at, ink=is_digit)
        arguments.write(args.out, figure.savefig)


def _at(args: argparse.Namespace, image: Tensor, filters: list[Filter]) -> list[str]:
    from convext.inspection.filters import apply_at

    parts = {"": image}
    if len(image) == 1:
        parts = {"": image[0]}
    elif args.colour == "each":
        parts = dict(zip((", red", ", green", ", blue"), image, strict=True))
    how = "sum" if args.colour == "each" else args.colour
    row, col = args.at
    return [
        f"{found.name} at {row}, {col}{color}:\n{apply_at(part, row, col, found, how)}"
        for found in filters
        for color, part in parts.items()
    ]


def _range(picture: Tensor) -> str:
    low, mean, high = (
        f"{round(float(value), 3) + 0.0:.3f}"  # + 0.0 makes a -0 a 0
        for value in (picture.min(), picture.mean(), picture.max())
    )
    return f"{' x '.join(map(str, picture.shape))}, from {low} to {high}, mean {mean}"
