"""`convext matrix`: the matrix that a convolution is."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convext.commands.arguments import add_out, numbers, show, size, write
from convext.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from convext.inspection import ConvMatrix

MOST_PRODUCTS = 5_000_000  # a second or two, and half a gigabyte


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "matrix",
        help="show the matrix that a convolution is",
        description="Prints the matrix that a convolution multiplies a flattened image by, where "
        "it is small: a letter for each weight, a dot for each zero that never changes. Says how "
        "large it is, how much of it is zero, how often it holds each weight, and how far it is "
        "from what the layer computes. Sizes are one number or two (height x width); the weights "
        "are random, the same each time.",
    )
    add = parser.add_argument
    add("--input-size", type=size, default=(3, 3), metavar="HxW", help="(default: 3x3)")
    add("--kernel-size", type=size, default=(2, 2), metavar="HxW", help="(default: 2x2)")
    add("--stride", type=size, default=(1, 1), metavar="HxW", help="(default: 1)")
    add(
        "--padding",
        type=_padding,
        default=(0, 0),
        metavar="N",
        help="rows and columns on each side, as 1 or 1,2; or same (default: 0)",
    )
    add(
        "--padding-mode",
        choices=("zeros", "reflect", "replicate", "circular"),
        default="zeros",
        help="(default: zeros)",
    )
    add("--dilation", type=size, default=(1, 1), metavar="HxW", help="(default: 1)")
    for option, what in (("in-channels", ""), ("out-channels", "filters"), ("groups", "")):
        add(f"--{option}", type=int, default=1, metavar="N", help=f"{what} (default: 1)".strip())
    add("--layers", choices=("convext", "torch"), default="convext", help="(default: convext)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from convext.inspection import conv_matrix
    from convext.inspection.conv_matrix import output_size

    if args.out is not None:
        import matplotlib  # noqa: F401 (its absence is said before anything is computed)

    image = (args.in_channels, *_two(args.input_size, "--input-size"))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        try:
            layer = _layer(args, "meta")  # without numbers, which there may be too many of
            products = math.prod(output_size(layer, image)) * layer.weight[0].numel()
            if products > MOST_PRODUCTS:
                raise UserError(
                    f"--input-size: {products:,} products of a weight and a cell; "
                    f"at most {MOST_PRODUCTS:,} are shown"
                )
            layer = _layer(args, "cpu")
            matrix = conv_matrix(layer, image)
            figure = None if args.out is None else matrix.plot()
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error
        forward, backward = _differences(layer, matrix)
    show(
        matrix,
        f"matrix @ input + bias: at most {forward:.2g} from the layer's output",
        f"transpose @ gradient of the output: at most {backward:.2g} from the layer's backward",
    )
    if figure is not None:
        write(args.out, figure.savefig)


def _differences(layer: nn.Conv2d, matrix: ConvMatrix) -> tuple[float, float]:
    """The largest between the layer and the matrix, for a random image and a random gradient."""
    import torch

    x = torch.randn(1, *matrix.input_size, requires_grad=True)
    out = layer(x)
    grad_output = torch.randn_like(out)
    out.backward(grad_output)
    forward = (matrix.apply(x.detach()) - out.detach()).abs().max()
    backward = (matrix.backward_input(grad_output) - x.grad).abs().max()
    return float(forward), float(backward)


def _layer(args: argparse.Namespace, device: str) -> nn.Conv2d:
    from torch import nn

    import convext

    for option in ("in_channels", "out_channels", "groups"):
        if getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise UserError(f"--{name} must be at least 1, got {getattr(args, option)}")
    padding = args.padding
    conv_type = convext.Conv2d if args.layers == "convext" else nn.Conv2d
    return conv_type(
        args.in_channels,
        args.out_channels,
        _two(args.kernel_size, "--kernel-size"),
        stride=_two(args.stride, "--stride"),
        padding=padding if isinstance(padding, str) else _two(padding, "--padding"),
        dilation=_two(args.dilation, "--dilation"),
        groups=args.groups,
        padding_mode=args.padding_mode,
        device=device,
    )


def _two(sizes: Sequence[int], option: str) -> tuple[int, int]:
    if len(sizes) > 2:
        raise UserError(f"{option} must be one number or two, got {','.join(map(str, sizes))}")
    return sizes[0], sizes[-1]


def _padding(text: str) -> str | tuple[int, ...]:
    return text if text == "same" else numbers(text)
