"""`convext summary`: a table of a model's layers."""

from __future__ import annotations

import argparse

from convext.commands.arguments import add_input_size, add_model, load_model, on_size, show


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "summary",
        help="what each layer computes: shapes, parameters, multiplications",
        description="Prints a row for each layer: its output's shape, its weights and biases, its "
        "multiplications for one image, and the receptive field of its cells.",
    )
    add_model(parser)
    add_input_size(parser)
    parser.add_argument(
        "--wide", action="store_true", help="multiply-adds, memory and jumps besides"
    )

    def run(args: argparse.Namespace) -> None:
        from convext.inspection.summary import summary

        model = load_model(args.model)
        found = on_size(lambda: summary(model, args.input_size), args)
        show(found.table(args.wide))

    parser.set_defaults(run=run)
