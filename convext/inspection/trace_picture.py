"""A trace as a picture: a row of grids for each step, the trace's cells framed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import COLORS, HIGHLIGHT, image, new_figure
from convext.inspection.kinds import CONV_BLOCKS, CONVOLUTIONS
from convext.inspection.terms import Terms, number, place
from convext.inspection.written import runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from convext.inspection.precedents import LayerCells, Trace
    from convext.inspection.step import Step

_CELL = COLORS[2]  # of the frame of the traced cell, or of a maximum's
_PALE = 0.65  # how much white lies over the cells that do not belong to the trace
_INCHES = 1.75  # of one grid
_STRIP = 0.3  # the height of a dense layer's numbers, of a grid's
_SUMS = 2  # channels whose products are drawn


def plot_trace(trace: Trace, channels: int = 4) -> Figure:
    """See `Trace.plot`."""
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    windows = [read for read in trace.terms.reads if len(read.window) == 3] if trace.terms else []
    sums = windows[0] if windows and windows[0].weights is not None else None
    sum_rows = 0 if sums is None else min(sums.window[0], _SUMS)
    most = max(min(len(_grids(cells)), channels) for cells in trace.layers)
    columns = max(most + 1, 3 if sum_rows else 0)  # the last one is for kernels
    heights = [_STRIP if _is_strip(cells) else 1.0 for cells in trace.layers] + [1.0] * sum_rows
    size = (_INCHES * columns + 1.3, (_INCHES + 0.3) * sum(heights) + 0.3)
    figure, axes = new_figure(len(heights), columns, size)
    axes[0, 0].get_gridspec().set_height_ratios(heights)
    for row, cells in zip(axes, trace.layers, strict=False):
        _draw_step(row, cells, trace, columns - 1)
    for channel, row in enumerate(axes[len(trace.layers) :]):
        _draw_sum(row, trace.terms, channel)
    for ax in figure.axes:
        if not ax.has_data():
            ax.set_axis_off()
    verb = "is computed from" if trace.direction == "precedents" else "has a part in"
    cell = place(trace.name, trace.index)
    figure.suptitle(f"{cell} = {number(trace.value)} {verb} the cells in frames", fontsize=10)
    return figure


def _grids(cells: LayerCells) -> list[int]:
    """The grids, of a value's last two axes, that have cells in the trace."""
    grids = cells.mask.reshape(-1, *_plane(cells)).flatten(1).any(1)
    return grids.nonzero()[:, 0].tolist()


def _plane(cells: LayerCells) -> tuple[int, int]:
    shape = tuple(cells.mask.shape)
    return (1, *shape)[-2:] if shape else (1, 1)


def _is_strip(cells: LayerCells) -> bool:
    height, width = _plane(cells)
    return width > 8 * height


def _draw_step(row: np.ndarray, cells: LayerCells, trace: Trace, limit: int) -> None:
    values = cells.values.detach().float().cpu().numpy().reshape(-1, *_plane(cells))
    masks = cells.mask.numpy().reshape(values.shape)
    leading = tuple(cells.mask.shape[:-2])
    grids = _grids(cells)
    shown = grids[:1] if _is_strip(cells) else grids[:limit]
    limits = float(values.min()), float(values.max())
    for ax, grid in zip(row, shown, strict=False):
        where = [int(i) for i in np.unravel_index(grid, leading)] if leading else []
        title = f"channel {where[1]}" if len(where) == 2 else ", ".join(map(str, where))
        marked = _marked(cells, trace, where)
        _draw_grid(ax, values[grid], masks[grid], title, limits, marked)
    row[0].set_ylabel(
        _label(cells, len(grids), len(shown)), rotation=0, ha="right", va="center", fontsize=8
    )
    if _is_strip(cells):
        _spread_out(row, _plane(cells)[1])
    elif trace.tape.steps[cells.step].kind in CONVOLUTIONS + CONV_BLOCKS and len(leading) == 2:
        outputs = [grid % leading[1] for grid in shown]
        _draw_kernels(row[-1], trace.tape.steps[cells.step], outputs, limit)


def _label(cells: LayerCells, grids: int, shown: int) -> str:
    count = int(cells.mask.sum())
    label = f"{cells.name}\n{count:,} cell{'s' if count > 1 else ''}"
    if cells.mask.dim() == 4:
        label += f"\nin {grids} of {cells.mask.shape[0] * cells.mask.shape[1]} channels"
    return label + (f",\n{shown} of them here" if grids > shown else "")


def _marked(cells: LayerCells, trace: Trace, where: list[int]) -> tuple[int, ...] | None:
    """The row and column in a grid of the traced cell, or of the one that is its maximum."""
    index = None
    if cells.step == trace.step:
        index = trace.index
    elif trace.terms is not None and trace.terms.winner is not None:
        index = trace.terms.winner if cells.step == trace.terms.reads[0].step else None
    if index is None or list(index[:-2]) != where:
        return None
    return (0, *index)[-2:]


def _spread_out(row: np.ndarray, width: int) -> None:
    """Has the first axes of a row take all of it."""
    for ax in row[1:]:
        ax.remove()
    place_in_row = row[0].get_subplotspec()
    row[0].set_subplotspec(place_in_row.get_gridspec()[place_in_row.rowspan.start, :])
    row[0].set_aspect("auto")
    if width <= 40:
        row[0].set_xticks(range(width), range(width), fontsize=7)


def _draw_grid(
    ax: Axes,
    values: np.ndarray,
    mask: np.ndarray,
    title: str,
    limits: tuple[float, float],
    marked: tuple[int, ...] | None,
) -> None:
    """One grid, pale but for the trace's cells, which have a frame around them."""
    from matplotlib.patches import Rectangle

    signed = limits[0] < 0
    image(ax, values, title, signed)
    largest = max(abs(limits[0]), abs(limits[1])) or 1.0  # of all the step's grids
    ax.images[0].set_clim((-largest if signed else 0.0), largest)
    veil = np.ones((*mask.shape, 4))
    veil[..., 3] = np.where(mask, 0.0, _PALE)
    ax.imshow(veil, interpolation="nearest")
    _frame(ax, mask)
    if marked is not None:
        corner = (marked[1] - 0.5, marked[0] - 0.5)
        style = {"fill": False, "edgecolor": _CELL, "linewidth": 2.5, "zorder": 3}
        ax.add_patch(Rectangle(corner, 1, 1, clip_on=False, **style))


def _frame(ax: Axes, mask: np.ndarray) -> None:
    """Lines where a cell of the mask borders on one that is not."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]) - 0.5
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]) - 0.5
    lines = [((x, y), (x, y + 1)) for y, x in upright] + [((x, y), (x + 1, y)) for y, x in level]
    ax.add_collection(LineCollection(lines, colors=HIGHLIGHT, linewidths=1.2, clip_on=False))


def _draw_kernels(ax: Axes, step: Step, outputs: list[int], limit: int) -> None:
    """The kernels of some output channels, a row for each, a column for each input channel."""
    arguments = step.named_arguments()
    if arguments.get("transposed"):
        return
    weight = arguments["weight"].detach().float().cpu().numpy()
    inputs = min(weight.shape[1], limit)
    height, width = weight.shape[2:]
    tiles = np.zeros((len(outputs) * (height + 1) - 1, inputs * (width + 1) - 1))
    gap = np.ones(tiles.shape, dtype=bool)
    for i, output in enumerate(outputs):
        for j in range(inputs):
            top, left = i * (height + 1), j * (width + 1)
            tiles[top : top + height, left : left + width] = weight[output, j]
            gap[top : top + height, left : left + width] = False
    image(ax, tiles, "", signed=True)
    ax.images[0].set_data(np.ma.masked_array(tiles, gap))
    for side in ax.spines.values():
        side.set_visible(False)
    of = f" of {weight.shape[1]}" if weight.shape[1] > inputs else ""
    plurals = ["s" if n > 1 else "" for n in (len(outputs), weight.shape[1])]
    ax.set_title(f"kernels: channel{plurals[0]} {runs(outputs)}", fontsize=8)
    ax.set_xlabel(f"{inputs}{of} input channel{plurals[1]}", fontsize=8)


def _draw_sum(row: np.ndarray, terms: Terms, channel: int) -> None:
    """Values, weights and products of one channel, with their numbers."""
    (read,) = terms.reads
    inside = read.inside.reshape(read.window)[channel].numpy()
    everywhere = np.ones_like(inside)
    values, weights, products = (
        numbers.reshape(read.window)[channel].numpy()
        for numbers in (read.values, read.weights, read.products)
    )
    signed = bool((read.values < 0).any())
    _draw_numbers(row[0], values, inside, "values", signed)
    _draw_numbers(row[1], weights, everywhere, "x weights", True)
    _draw_numbers(row[2], products, everywhere, "= products", True)
    together = f"together {number(float(products.sum()))}"
    if channel + 1 == min(_SUMS, read.window[0]):
        bias = "" if terms.bias is None else " and the bias"
        together += f"\nall {len(read.cells)} products{bias}: {number(terms.total)}"
    row[2].set_xlabel(together, fontsize=8)
    of = int(read.cells.reshape(*read.window, -1)[channel, 0, 0, 1])
    row[0].set_ylabel(
        f"{read.name},\nchannel {of}", rotation=0, ha="right", va="center", fontsize=8
    )


def _draw_numbers(ax: Axes, grid: np.ndarray, inside: np.ndarray, title: str, signed: bool) -> None:
    from matplotlib.patches import Rectangle

    image(ax, grid, title, signed)
    depth = ax.images[0].norm(grid)
    dark = np.abs(depth - 0.5) > 0.3 if signed else depth > 0.6
    for (row, column), value in np.ndenumerate(grid):
        if not inside[row, column]:
            style = {"facecolor": "white", "edgecolor": "#cccccc", "hatch": "///", "linewidth": 0}
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))
        if max(grid.shape) <= 5:
            ax.text(
                column,
                row,
                f"{value + 0.0:.2g}" if inside[row, column] else "pad",
                color="white" if dark[row, column] and inside[row, column] else "black",
                ha="center",
                va="center",
                fontsize=8 if max(grid.shape) <= 3 else 6,
            )
