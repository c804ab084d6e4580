"""`convext trace`: the cells that one activation reads, or that read one cell."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from convext.commands.arguments import (
    add_image,
    add_model,
    add_out,
    index_of,
    load_input,
    load_model,
    numbers,
    show,
    write,
)
from convext.errors import UserError

if TYPE_CHECKING:
    from convext.inspection.step import Step
    from convext.inspection.tape import Tape


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "trace",
        help="show which cells one activation is computed from",
        description="Shows the cells of every layer that one activation is computed from, and its "
        "sum of values times weights, written out; or which activations one cell has a part in.",
    )
    add_model(parser, default="example")
    add_image(parser)
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="whose output has the cell, or input (default: the last convolution; with "
        "--dependents the input)",
    )
    parser.add_argument(
        "--index",
        type=numbers,
        metavar="N,C,H,W",
        help="the cell's place in that output; N may be left out (default: its middle, channel 0)",
    )
    parser.add_argument(
        "--dependents",
        action="store_true",
        help="the cells that depend on this one, not those that it depends on",
    )
    add_out(parser)
    parser.add_argument(
        "--xlsx",
        metavar="FILE",
        help="write a workbook in which each cell is a formula over those that it reads",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a page that lights up what a cell reads"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from convext.inspection.precedents import dependents_on, precedents_on
    from convext.inspection.tape import record

    model, input = load_model(args.model), load_input(args)
    try:
        tape = record(model, input)
    except (RuntimeError, ValueError) as error:
        sizes = " x ".join(map(str, input.shape))
        reason = str(error).partition("\n")[0]
        raise UserError(f"MODEL {args.model} can't take a {sizes} input: {reason}") from error
    step = _step(tape, args)
    index = args.index
    if index is not None and len(index) == step.value.dim() - 1 and step.value.shape[0] == 1:
        index = (0, *index)
    trace = dependents_on if args.dependents else precedents_on
    try:
        found = trace(tape, step, index_of(index, step.value.shape, "--index"))
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    show(found)
    if args.out is not None:
        write(args.out, lambda path: found.plot().savefig(path))
    if args.xlsx is not None:
        from convext.inspection.workbook import write_workbook

        write(args.xlsx, lambda path: write_workbook(model, input, path), "--xlsx")
    if args.html is not None:
        from convext.inspection.page import write_page

        write(args.html, lambda path: write_page(model, input, path), "--html")


def _step(tape: Tape, args: argparse.Namespace) -> Step:
    from convext.inspection.kinds import CONV_BLOCKS, CONVOLUTIONS

    if args.layer is None and not args.dependents:
        convolutions = [step for step in tape.steps if step.kind in CONVOLUTIONS + CONV_BLOCKS]
        if not convolutions:
            raise UserError(f"MODEL {args.model} has no convolution: say by --layer which cell")
        return convolutions[-1]
    try:
        return tape.find("input" if args.layer is None else args.layer)
    except ValueError as error:
        raise UserError(f"--{error}") from error
