"""A convolution's matrix as text: letters for weights, dots for zeros by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convext.inspection.conv_matrix_plot import axis_names, cell_names, color_of

if TYPE_CHECKING:
    from convext.inspection.conv_matrix import ConvMatrix

ZERO = "."
WIDEST = 100  # characters
MOST_ROWS = 40
MOST_WEIGHTS = 24

Part = tuple[str, str]  # text, and the colour of the weight that it names, or ""
Line = list[Part]


def lines(matrix: ConvMatrix) -> list[Line]:
    """What `print` shows: the matrix and its weights where they are small, and the facts."""
    head = f"{matrix.layer}, input {_shape(matrix.input_size)}, output {_shape(matrix.output_size)}"
    parts = [[_plain(head)], _grid(matrix), _weights(matrix), [_plain(f) for f in facts(matrix)]]
    found: list[Line] = []
    for part in filter(None, parts):
        found += [_plain(""), *part]
    return found[1:]


def facts(matrix: ConvMatrix) -> list[str]:
    """Its size, its zeros, and how often it uses each weight."""
    rows, columns = matrix.shape
    weights = matrix.weight.numel()
    least, most = int(matrix.uses.min()), int(matrix.uses.max())
    often = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    found = [
        f"{rows:,} x {columns:,} matrix, {rows * columns:,} entries",
        f"{matrix.zeros:,} are zero by construction ({matrix.zeros / (rows * columns):.1%})",
        f"{matrix.entries:,} hold {weights:,} weight{'s' * (weights > 1)}, "
        f"each used {often} time{'s' * (most > 1)}",
    ]
    if matrix.sums:
        sums = int((matrix.weight_index >= weights).sum())
        found.append(
            f"{sums:,} of these are sums: padding repeats cells, and several weights meet one"
        )
    return found


def _grid(matrix: ConvMatrix) -> list[Line]:
    """The entries, under the places of input cells and beside those of output cells."""
    rows, columns = matrix.shape
    if rows > MOST_ROWS or 2 * columns > WIDEST:  # a letter and a space for each
        return []
    heads = zip(*(place.split(",") for place in cell_names(matrix.input_size)), strict=True)
    table = [
        [(f"input {axis}", ""), *((text, "") for text in head)]
        for axis, head in zip(axis_names(matrix.input_size), heads, strict=True)
    ]
    table.append([(f"output {','.join(axis_names(matrix.output_size))}", "")])
    for place, numbers in zip(cell_names(matrix.output_size), matrix.ties().tolist(), strict=True):
        cells = [
            (ZERO if number < 0 else matrix.name_of(number), color_of(matrix, number))
            for number in numbers
        ]
        table.append([(place, ""), *cells])
    found = _aligned(table, " ")
    return found if sum(len(text) for text, _ in found[0]) <= WIDEST else []


def _weights(matrix: ConvMatrix) -> list[Line]:
    """Each weight: its name, place and value, and how often the matrix uses it."""
    if matrix.weight.numel() > MOST_WEIGHTS:
        return []
    filters, *kernel = matrix.weight.shape
    places = [
        f"{filter},{place}" if filters > 1 else place
        for filter in range(filters)
        for place in cell_names(kernel)
    ]
    axes = ["filter"] * (filters > 1) + axis_names(kernel)
    table = [[("weight", ""), (",".join(axes), ""), ("value", ""), ("uses", "")]]
    values, uses = matrix.weight.view(-1).tolist(), matrix.uses.view(-1).tolist()
    for number, (place, value, count) in enumerate(zip(places, values, uses, strict=True)):
        texts = (matrix.name_of(number), place, f"{value:.4f}", f"{count:,}")
        table.append([(text, color_of(matrix, number)) for text in texts])
    return _aligned(table, "  ")


def _aligned(table: list[list[Part]], between: str) -> list[Line]:
    """Columns of a table, each as wide as it must be, flush right."""
    widths = [0] * max(map(len, table))
    for row in table:
        for column, (text, _) in enumerate(row):
            widths[column] = max(widths[column], len(text))
    return [
        [
            (f"{between if column else ''}{text.rjust(widths[column])}", color)
            for column, (text, color) in enumerate(row)
        ]
        for row in table
    ]


def _plain(text: str) -> Line:
    return [(text, "")]


def _shape(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
