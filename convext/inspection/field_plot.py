"""A picture of the receptive fields on the way to one cell."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from convext.inspection.drawing import COLORS, new_figure
from convext.inspection.receptive_field import ReceptiveFields, cell_mask, enclosing
from convext.inspection.table import pair, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

BEYOND = "#e4e4e4"  # where padding stands for pixels


def plot_fields(
    found: ReceptiveFields, layer: str | nn.Module | None, cell: tuple[int, int] | None
) -> Figure:
    """Of `ReceptiveFields.plot`, which says what it shows."""
    from matplotlib.patches import Patch

    name, cell = found.grid_cell(layer, cell)
    boxes = _boxes(found, name, cell)
    height, width = found.input_size[2:]
    figure, ((axes, key),) = new_figure(1, 2, size=(9.4, 4.8))
    _draw_image(axes, height, width)
    handles = []
    for number, (label, (top, bottom), (left, right)) in enumerate(boxes):
        color = COLORS[number % len(COLORS)]
        # The smaller ones above, so that a shared edge hides no whole box.
        style = {"edgecolor": color, "linewidth": 2.2, "zorder": 3 + len(boxes) - number}
        axes.add_patch(_rectangle(top, bottom, left, right, **style))
        handles.append(Patch(facecolor="none", edgecolor=color, linewidth=2.2, label=label))
    handles.append(Patch(facecolor="white", edgecolor="#999999", label=f"image {height} x {width}"))
    handles.append(Patch(facecolor=BEYOND, edgecolor=BEYOND, label="beyond the image"))
    rows = [0, height - 1, *(edge for _, ends, _ in boxes for edge in ends)]
    columns = [0, width - 1, *(edge for _, _, ends in boxes for edge in ends)]
    margin = 0.5 + 0.03 * max(max(rows) - min(rows), max(columns) - min(columns))
    axes.set_xlim(min(columns) - margin, max(columns) + margin)
    axes.set_ylim(max(rows) + margin, min(rows) - margin)
    axes.set_aspect("equal")
    axes.set_xlabel("column of pixels")
    axes.set_ylabel("row of pixels")
    axes.set_title(f"{found.model}: what {name}[{cell[0]}, {cell[1]}] depends on", fontsize=10)
    axes.set_anchor("E")
    # The layout is made before pixels are made square, which takes a little more room.
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    key.legend(handles=handles, loc="upper left", borderaxespad=0, fontsize=9, frameon=False)
    key.set_axis_off()
    return figure


def _boxes(found: ReceptiveFields, name: str, cell: tuple[int, int]) -> list:
    """(label, (top, bottom), (left, right)) of each new field, in pixels, smallest first."""
    last = found.tape.find(name)
    reached = found.tape.precedents(last.index, cell_mask(last, cell))
    boxes: dict[tuple, str] = {}
    for row in found.rows:
        step = found.tape.find(row.name)
        mask = reached.get(step.index)
        if row.jump is None or len(row.output_shape) != 4 or mask is None or not mask.any():
            continue
        middle = [(side.start + side.stop - 1) // 2 for side in enclosing(mask)]
        places = found.places[step.index].places
        box = tuple((p.axis.low(i), p.axis.high(i)) for p, i in zip(places, middle, strict=True))
        if inf in (box[0][0], box[1][0]):
            continue  # it reads nothing
        if box not in boxes or row.name == name:  # a ReLU's is that of the convolution before it
            jump = f"jump {pair(row.jump)}"
            boxes[box] = f"{row.name}[{middle[0]}, {middle[1]}]: {sizes(row.size)}, {jump}"
    found_boxes = [(label, *box) for box, label in boxes.items()]
    found_boxes.sort(key=lambda box: (box[1][1] - box[1][0], box[2][1] - box[2][0]))
    # As many as there are colours, spread evenly, the cell's own among them.
    shown = min(len(found_boxes), len(COLORS))
    return [found_boxes[(i + 1) * len(found_boxes) // shown - 1] for i in range(shown)]


def _draw_image(axes: Axes, height: int, width: int) -> None:
    axes.set_facecolor(BEYOND)
    axes.add_patch(
        _rectangle(0, height - 1, 0, width - 1, facecolor="white", edgecolor="#999999", fill=True)
    )
    if max(height, width) <= 64:  # else lines between pixels would leave no white
        lines = {"color": "#dddddd", "linewidth": 0.6, "zorder": 1}
        axes.hlines([row - 0.5 for row in range(1, height)], -0.5, width - 0.5, **lines)
        axes.vlines([column - 0.5 for column in range(1, width)], -0.5, height - 0.5, **lines)


def _rectangle(top: float, bottom: float, left: float, right: float, **style):
    """Around pixels, whose centres are whole numbers."""
    from matplotlib.patches import Rectangle

    style = {"fill": False, **style}
    return Rectangle((left - 0.5, top - 0.5), right - left + 1, bottom - top + 1, **style)
