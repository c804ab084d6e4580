"""A convolution's matrix as a picture: each weight in one colour, wherever it stands."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import DPI, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from convext.inspection.conv_matrix import ConvMatrix

# As many as the eye tells apart: of matplotlib's tab20, all but greys, strong ones first.
COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22"),
    *("#17becf", "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2"),
    *("#dbdb8d", "#9edae5"),
)
SUM = "#7f7f7f"
MANY = "turbo"  # by the weight's number, where there are more weights than colours
NAMED = 40  # rows or columns whose cells are named
MOST = 2000  # rows or columns


def color_of(matrix: ConvMatrix, number: int) -> str:
    """The colour of a number of `weight_index`; "" for zeros, and where weights are too many."""
    if number < 0 or matrix.weight.numel() > len(COLORS):
        return ""
    return COLORS[number] if number < matrix.weight.numel() else SUM


def axis_names(size: Sequence[int]) -> list[str]:
    """What the numbers in `cell_names` count."""
    return ["channel"] * (size[0] > 1) + ["row", "column"]


def cell_names(size: Sequence[int]) -> list[str]:
    """The place of each cell of (C, H, W), as "row,column", or "channel,row,column" of several."""
    axes = size if size[0] > 1 else size[1:]
    return [",".join(map(str, cell)) for cell in itertools.product(*map(range, axes))]


def plot(matrix: ConvMatrix) -> Figure:
    """The matrix, and beside it the kernels in the same colours."""
    rows, columns = matrix.shape
    if max(rows, columns) > MOST:
        raise ValueError(
            f"a picture shows at most {MOST} rows and columns, got {rows} x {columns}: "
            "take a smaller input_size"
        )
    weights = matrix.weight.numel()
    kernels = _mosaic(matrix)
    # Inches of a cell: room for its name where they are few, a dot of the picture where many.
    cell = max(1.3 / DPI, min(0.45, 11 / max(rows, columns)))
    if weights <= len(COLORS):
        kernel_cell = 0.6
    else:
        kernel_cell = min(0.3, max(3.5, rows * cell / 2) / max(kernels.shape))
    figure, left, right = _two_axes((columns * cell, rows * cell), kernels.shape, kernel_cell)
    ties = matrix.ties().cpu().numpy()
    _draw(left, matrix, ties)
    if cell > 0.2:
        _name_cells(left, matrix, ties, min(11, 34 * cell))
    _name_axis(left.xaxis, matrix.input_size)
    _name_axis(left.yaxis, matrix.output_size)
    left.set_xlabel(f"input cell ({', '.join(axis_names(matrix.input_size))})", fontsize=8)
    label = f"output cell ({', '.join(axis_names(matrix.output_size))})"
    left.set_ylabel(label if rows * cell > 1.5 else "output", fontsize=8)
    grey = ", grey a sum of weights" if matrix.sums else ""
    left.set_title(f"{rows:,} x {columns:,} matrix; white is always 0{grey}", fontsize=9)

    _draw(right, matrix, kernels)
    if weights <= len(COLORS):
        _name_cells(right, matrix, kernels, 9, values=True)
    right.set_axis_off()
    right.set_title("weights", fontsize=9)
    return figure


def _two_axes(
    matrix: tuple[float, float], kernels: tuple[int, int], kernel_cell: float
) -> tuple[Figure, Axes, Axes]:
    """Axes of these inches (width, height), and beside them for kernels of (rows, columns)."""
    left, bottom, top, gap = 0.9, 0.8, 0.4, 0.4
    beside = (kernels[1] * kernel_cell, kernels[0] * kernel_cell)
    rooms = (max(matrix[0], 2.5), max(beside[0], 0.8))  # a title and labels need as much
    inside = max(matrix[1], beside[1], 1.6)
    width, height = left + sum(rooms) + 1.5 * gap, bottom + inside + top
    # Laid out by hand: matplotlib's engines leave squares too little room, or too much.
    figure, (axes,) = new_figure(1, 2, (width, height))
    figure.set_layout_engine("none")
    for each, (wide, high), room in zip(axes, (matrix, beside), rooms, strict=True):
        x, y = left + (room - wide) / 2, bottom + (inside - high) / 2
        each.set_position([x / width, y / height, wide / width, high / height])
        left += room + gap
    return figure, *axes


def _mosaic(matrix: ConvMatrix) -> np.ndarray:
    """The numbers of all weights: a row of kernels for each filter, and -1 between kernels."""
    filters, channels, height, width = matrix.weight.shape
    tiles = np.full((filters, height + 1, channels, width + 1), -1)
    numbers = np.arange(matrix.weight.numel()).reshape(filters, channels, height, width)
    tiles[:, :height, :, :width] = numbers.transpose(0, 2, 1, 3)
    return tiles.reshape(filters * (height + 1), channels * (width + 1))[:-1, :-1]


def _draw(axes: Axes, matrix: ConvMatrix, numbers: np.ndarray) -> None:
    """Numbers of `weight_index` in their colours, -1 in white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    weights = matrix.weight.numel()
    if weights <= len(COLORS):
        palette = np.array([to_rgb(color) for color in COLORS[:weights]])
    else:
        palette = colormaps[MANY](np.linspace(0.1, 0.9, weights))[:, :3]  # without its dark ends
    sums = np.tile(to_rgb(SUM), (len(matrix.sums), 1))
    palette = np.concatenate([palette, sums, [to_rgb("white")]])  # -1 is the last
    axes.imshow(palette[numbers], interpolation="nearest")


def _name_cells(
    axes: Axes, matrix: ConvMatrix, numbers: np.ndarray, size: float, values: bool = False
) -> None:
    """Writes into each cell which weight it is, and the weight's value or else zeros.

    Args:
        size: of a letter that stands alone, in points.
    """
    flat = matrix.weight.view(-1).tolist()
    middle = {"ha": "center", "va": "center"}
    zero = "0" if matrix.name_of(0) != "0" else "."  # where numbers stand for weights
    for (row, column), number in np.ndenumerate(numbers):
        if number >= 0:
            text = matrix.name_of(int(number))
            if values:
                text += f"\n{flat[number]:.2g}"
            elif "+" in text:  # two of a sum in a line
                text = re.sub(r"(\w+\+\w+\+)", r"\1\n", text)
            shrink = 1 if values else min(1, 3 / max(map(len, text.split("\n"))))
            axes.text(column, row, text, fontsize=size * shrink, **middle)
        elif not values:
            axes.text(column, row, zero, color="#bbbbbb", fontsize=size, **middle)


def _name_axis(axis: Axis, size: Sequence[int]) -> None:
    """Names cells by place where they are few, else channels or rows; lines part channels."""
    channels, height, width = size
    cells = height * width
    axis.set_tick_params(labelsize=7, length=2)
    line, turn = (axis.axes.axhline, 0) if axis.axis_name == "y" else (axis.axes.axvline, 90)
    for channel in range(1, channels):
        line(channel * cells - 0.5, color="black", linewidth=0.5)
    if channels * cells <= NAMED:
        axis.set_ticks(range(channels * cells), cell_names(size), rotation=turn)
    elif 1 < channels <= NAMED:
        middle = (np.arange(channels) + 0.5) * cells - 0.5
        axis.set_ticks(middle, [f"channel {channel}" for channel in range(channels)])
    elif channels == 1 and height <= NAMED:
        middle = (np.arange(height) + 0.5) * width - 0.5
        axis.set_ticks(middle, [f"row {row}" for row in range(height)], rotation=turn)
