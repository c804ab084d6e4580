"""`convext receptive-field`: which pixels a layer's cells depend on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from convext.commands.arguments import (
    add_input_size,
    add_model,
    add_out,
    load_model,
    numbers,
    on_size,
    show,
    write,
)
from convext.errors import UserError

if TYPE_CHECKING:
    from convext.inspection.receptive_field import ReceptiveFields


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "receptive-field",
        help="which pixels each layer's cells depend on",
        description="Prints the receptive field of each layer's cells: its size in pixels, the "
        "jump from one cell's to the next one's, the centre of the first, and how far and how "
        "often they reach into the padding. With --layer or --cell, one cell's pixels.",
    )
    add_model(parser)
    add_input_size(parser)
    parser.add_argument("--layer", metavar="NAME", help="of the cell (default: the last grid)")
    parser.add_argument(
        "--cell",
        type=numbers,
        metavar="ROW,COL",
        help="of that layer's output (default: in the middle)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare arithmetic with the pixels that are found by following the cells",
    )
    add_out(parser)

    def run(args: argparse.Namespace) -> None:
        from convext.inspection.receptive_field import receptive_field

        model = load_model(args.model)
        found = on_size(lambda: receptive_field(model, args.input_size), args)
        asked = args.layer is not None or args.cell is not None
        if asked or args.out is not None:
            layer, cell = _place(found, args)
        show(found)
        if asked:
            print(_cell(found, layer, cell))
        if args.check:
            print(_check(found))
        if args.out is not None:
            write(args.out, found.plot(layer, cell).savefig)

    parser.set_defaults(run=run)


def _place(found: ReceptiveFields, args: argparse.Namespace) -> tuple[str, tuple[int, int]]:
    try:
        return found.grid_cell(args.layer, args.cell)
    except ValueError as error:
        raise UserError(str(error)) from error


def _cell(found: ReceptiveFields, layer: str, cell: tuple[int, int]) -> str:
    rows, columns = found.field_of(layer, *cell)
    place = f"{layer}[{', '.join(map(str, cell))}]"
    if not rows:
        return f"{place} depends on no pixel"
    return (
        f"{place} depends on rows {rows.start} to {rows.stop - 1} and "
        f"columns {columns.start} to {columns.stop - 1} of the image"
    )


def _check(found: ReceptiveFields) -> str:
    checks = found.check()
    wrong = [f"{check.layer}{list(check.cell)}" for check in checks if not check.agrees]
    if wrong:
        return f"arithmetic and the tape disagree on {', '.join(wrong)}"
    return f"arithmetic agrees with the pixels found for {len(checks)} cells"
