"""Traces and terms as text: regions of cells, and sums written out beside their kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convext.inspection.terms import Read, Terms, number, place

if TYPE_CHECKING:
    from convext.inspection.precedents import LayerCells, Trace

# What the axes of a value are called, by their number.
AXES = {2: ("row", "feature"), 4: ("image", "channel", "row", "column")}
BLOCKS = 4  # channels written out
DIGITS = 3  # of the numbers in blocks
LINES = 10  # terms of a sum that has no window
WIDTH = 100  # of a terminal
_COLUMNS = ("layer", "shape", "cells", "where")


def region(mask: Tensor) -> str:
    """Where the cells of a mask are: channels 0-1, rows 12-14, columns 3-5.

    Where they do not fill that box, how many of it they are.
    """
    names = AXES.get(mask.dim(), [f"axis {axis}" for axis in range(mask.dim())])
    parts, box = [], 1
    for axis, name in enumerate(names):
        found = mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1).nonzero()[:, 0]
        box *= len(found)
        if axis > 0 or mask.shape[0] > 1:
            plural = "s" if len(found) > 1 and not name.startswith("axis") else ""
            parts.append(f"{name}{plural} {runs(found.tolist())}")
    count = int(mask.sum())
    return ", ".join(parts) + (f" ({count} of these {box})" if count < box else "")


def runs(numbers: list[int]) -> str:
    """Numbers in order, neighbours joined: 0-2, 5; of many separate ones only the ends."""
    groups: list[list[int]] = []
    for n in numbers:
        if groups and groups[-1][-1] == n - 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    to = "-" if numbers[0] >= 0 else " to "
    if len(groups) > 4:
        return f"{numbers[0]} to {numbers[-1]}, {len(numbers)} of them"
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}{to}{g[-1]}" for g in groups)


def trace_rows(trace: Trace) -> list[tuple[str, str, str, str]]:
    """The table of a trace: layer, shape, number of cells, region."""
    return [
        (
            cells.name,
            " x ".join(str(size) for size in cells.mask.shape),
            f"{int(cells.mask.sum()):,}",
            region(cells.mask),
        )
        for cells in trace.layers
    ]


def _heading(trace: Trace) -> str:
    cell = f"{place(trace.name, trace.index)} = {number(trace.value)}"
    verb = "is computed from" if trace.direction == "precedents" else "has a part in"
    return f"{cell} {verb} these cells"


def _details(trace: Trace) -> str:
    if trace.terms is not None:
        return written_terms(trace.terms)
    read = [cells for cells in trace.layers if cells.weights is not None]
    return "\n\n".join(_written_weights(cells, trace) for cells in read)


def written_trace(trace: Trace) -> str:
    """The text form of a trace."""
    rows = [_COLUMNS, *trace_rows(trace)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
        for row in rows
    )
    return "\n\n".join(filter(None, (_heading(trace), table, _details(trace))))


def rich_trace(trace: Trace) -> object:
    """The same for rich, the regions as a table."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_heading(trace), box=box.SIMPLE_HEAD, title_style="", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name == "cells" else "left")
    for row in trace_rows(trace):
        table.add_row(*row)
    details = _details(trace)
    return Group(table, Text(f"\n{details}")) if details else table


def written_terms(terms: Terms) -> str:
    """The text form of terms: values beside weights and products, and what they come to."""
    cell = place(terms.step.name, terms.index)
    if terms.rule == "sum":
        return "\n\n".join([*_written_products(terms), _written_sum(terms)])
    if terms.rule == "max":
        equal = int((terms.reads[0].values == terms.result).sum())
        first = f", the first of {equal} equal ones" if equal > 1 else ""
        winner = place(terms.reads[0].name, terms.winner)
        window = _blocks(terms.reads[0], 1, terms.winner)
        return f"{window}\n\n{cell} = {terms.formula} = {number(terms.result)}: {winner}{first}"
    if terms.rule in ("formula", "copy"):
        source = next(read for read in terms.reads if len(read.cells))
        name = f"{place(source.name, source.cells[0])} = {number(float(source.values[0]))}"
        if terms.rule == "copy":
            return f"{cell} is a copy of {name}"
        return f"{name}\n{cell} = {terms.formula} = {number(terms.result)}"
    lines = [f"{cell} = {number(terms.value)}, by {terms.step.kind}, reads"]
    for read in terms.reads:
        lines += [
            f"  {place(read.name, index)} = {number(value)}"
            for index, value in zip(read.cells[:LINES], read.values.tolist(), strict=False)
        ]
        if len(read.cells) > LINES:
            lines.append(f"  and {len(read.cells) - LINES:,} more cells of {read.name}")
    return "\n".join(lines)


def _written_products(terms: Terms) -> list[str]:
    written = []
    for read in terms.reads:
        if len(read.window) == 3:
            written.append(_blocks(read, BLOCKS))
        elif len(read.cells):
            written.append(_largest(read))
    return written


def _written_sum(terms: Terms) -> str:
    cell = place(terms.step.name, terms.index)
    count = sum(len(read.cells) for read in terms.reads)
    products = math.fsum(p for read in terms.reads for p in read.products.tolist())
    rows = [(f"sum of {count:,} product{'s' if count != 1 else ''}", products)]
    if terms.bias is not None:
        rows += [("bias", terms.bias), ("together", terms.total)]
    rows = [(name, number(value)) for name, value in rows]
    if terms.formula:
        rows.append((f"then {terms.formula}", number(terms.result)))
    rows.append((f"{cell}, as the model computed it", number(terms.value)))
    names, values = (max(len(row[i]) for row in rows) for i in range(2))
    return "\n".join(f"{name:<{names}}  {value:>{values}}" for name, value in rows)


def _largest(read: Read) -> str:
    """The largest products of a sum without a window, and what the others come to."""
    products = read.products
    order = products.abs().argsort(descending=True, stable=True)
    shown = order[:LINES].tolist()
    rows = [
        (
            place(read.name, read.cells[k]),
            number(float(read.values[k])) if read.inside[k] else "pad",
            number(float(read.weights[k])),
            number(float(products[k])),
        )
        for k in shown
    ]
    w = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{w[0]}}  {b:>{w[1]}} x {c:>{w[2]}} = {d:>{w[3]}}" for a, b, c, d in rows]
    if len(order) > LINES:
        rest = number(float(products[order[LINES:]].sum()))
        lines.insert(0, f"the {LINES} largest of {len(order):,} products")
        lines.append(f"the other {len(order) - LINES:,} come to {rest}")
    return "\n".join(lines)


def _blocks(read: Read, limit: int, winner: tuple[int, ...] | None = None) -> str:
    """A window's values, weights and products, a block of rows and columns for each channel."""
    channels, height, width = read.window
    cells = read.cells.reshape(channels, height * width, -1)
    inside = read.inside.reshape(read.window)
    written = []
    for channel in range(min(channels, limit)):
        grids = {"value": read.values.reshape(read.window)[channel]}
        if read.weights is not None:
            grids["weight"] = read.weights.reshape(read.window)[channel]
            grids["product"] = read.products.reshape(read.window)[channel]
        texts = {
            name: [
                [
                    number(float(grid[r, c]), DIGITS)
                    if inside[channel, r, c] or name == "weight"
                    else "pad"
                    for c in range(width)
                ]
                for r in range(height)
            ]
            for name, grid in grids.items()
        }
        if "product" in texts:  # padding counts as 0
            texts["product"] = [["0" if t == "pad" else t for t in row] for row in texts["product"]]
        if winner is not None:
            at = [tuple(cell) for cell in cells[channel].tolist()].index(winner)
            row, column = divmod(at, width)
            texts["value"][row][column] = f"[{texts['value'][row][column]}]"
        box = cells[channel]
        rows, columns = (runs(sorted(set(box[:, axis].tolist()))) for axis in (-2, -1))
        title = f"{read.name}, channel {int(box[0, -3])}, rows {rows}, columns {columns}"
        if "product" in grids and channels > 1:
            title += f": products come to {number(float(grids['product'].sum()))}"
        written.append(f"{title}\n{_side_by_side(texts)}")
    if channels > limit:
        rest = read.products.reshape(read.window)[limit:].sum()
        written.append(
            f"and {channels - limit} more channels, whose products come to {number(float(rest))}"
        )
    return "\n\n".join(written)


def _side_by_side(texts: dict[str, list[list[str]]]) -> str:
    """Grids beside each other, as in value x weight = product; one below another if too wide."""
    blocks = []
    for name, rows in texts.items():
        width = max(len(text) for row in rows for text in row)
        lines = [" ".join(text.rjust(width) for text in row) for row in rows]
        length = max(len(name), len(lines[0]))
        head = [name.ljust(length)] if name else []
        blocks.append([*head, *(line.ljust(length) for line in lines)])
    middle = len(blocks[0]) // 2
    if sum(len(block[0]) + 5 for block in blocks) > WIDTH:
        return "\n".join(f"  {line}".rstrip() for block in blocks for line in block)
    lines = []
    for number_of_line, parts in enumerate(zip(*blocks, strict=True)):
        signs = (" x ", " = ") if number_of_line == middle else ("   ", "   ")
        text = parts[0]
        for sign, part in zip(signs, parts[1:], strict=False):
            text += f" {sign} {part}"
        lines.append(f"  {text}".rstrip())
    return "\n".join(lines)


def _written_weights(cells: LayerCells, trace: Trace) -> str:
    """By which weights a step's cells multiply the traced one."""
    head = f"{cells.name} multiplies {place(trace.name, trace.index)} by"
    per_channel = cells.mask.transpose(0, 1).flatten(1).sum(1) if cells.mask.dim() == 4 else None
    if per_channel is not None and per_channel.max() > 1:
        return _weight_blocks(cells, per_channel.nonzero()[:, 0].tolist(), head)
    weights = cells.weights[cells.mask].tolist()
    rows = [
        (number(weight), place(cells.name, cell))
        for weight, cell in zip(weights[:LINES], cells.cells, strict=False)
    ]
    width = max(len(weight) for weight, _ in rows)
    lines = [head, *(f"  {weight:>{width}} in {name}" for weight, name in rows)]
    if len(weights) > LINES:
        lines.append(f"  and by other weights in {len(weights) - LINES:,} more cells")
    return "\n".join(lines)


def _weight_blocks(cells: LayerCells, channels: list[int], head: str) -> str:
    written = []
    for channel in channels[:BLOCKS]:
        of_channel = torch.zeros_like(cells.mask)
        of_channel[:, channel] = cells.mask[:, channel]
        image = int(of_channel.nonzero()[0, 0])
        plane, weights = of_channel[image, channel], cells.weights[image, channel]
        rows, columns = (plane.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        texts = [
            [number(float(weights[r, c]), DIGITS) if plane[r, c] else "." for c in columns]
            for r in rows
        ]
        written.append(f"{head} these, in {region(of_channel)}\n{_side_by_side({'': texts})}")
    if len(channels) > BLOCKS:
        written.append(f"and by other weights in {len(channels) - BLOCKS} more channels")
    return "\n\n".join(written)
