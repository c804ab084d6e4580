"""`convext show`: a model's filters, and its activations on one image."""

from __future__ import annotations

import argparse

from convext.commands import arguments
from convext.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="show a model's filters and its activations on one image",
        description="Says what each convolution and activation function of a model puts out for "
        "an image, and which channels are dead on it: nowhere above 0. --filters and "
        "--activations draw pictures.",
    )
    arguments.add_model(parser)
    arguments.add_image(parser)
    add = parser.add_argument
    add(
        "--layer",
        metavar="NAME",
        help="of this layer alone, channel by channel (default: a line for each layer, and the "
        "filters of the first convolution)",
    )
    add("--filters", metavar="FILE", help="draw the filters here (.png, .svg, .pdf)")
    add("--activations", metavar="FILE", help="draw the activations here")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from torch import nn

    from convext.inspection.show import show_activations, show_filters

    model = arguments.load_model(args.model)
    image = arguments.load_input(args)
    layers = None if args.layer is None else [args.layer]
    kernels = None
    try:
        activations = show_activations(model, image, layers)
        named = dict(model.named_modules()).get(args.layer)
        if args.layer is None or args.filters is not None or isinstance(named, nn.Conv2d):
            kernels = show_filters(model, args.layer)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"MODEL {args.model}: {str(error).splitlines()[0]}") from error
    if kernels is not None:
        print(kernels)
    if args.layer is None:
        arguments.show(activations)
    else:
        print(activations.layers[0])
    if args.filters is not None:
        arguments.write(args.filters, kernels.plot().savefig, "--filters")
    if args.activations is not None:
        arguments.write(args.activations, activations.plot().savefig, "--activations")
