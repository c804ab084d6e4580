"""How filters and activations are drawn: many small pictures on one scale, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from convext.inspection import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from convext.inspection.show import Activations, LayerFilters, LayerMaps

_TILE = 30  # cells that a picture's longer side takes at least, so that gaps can be thin beside it
_NUMBER = 0.13  # inches of a picture's number in height
_MOST_NUMBERED = 64  # pictures: more would be too small for numbers
_ACROSS = 4.6  # inches of a layer's pictures side by side


@dataclass(frozen=True)
class _Layout:
    """Where pictures of one size lie side by side, in cells.

    Attributes:
        count: of the pictures.
        factor: by which they are enlarged.
        height, width: of one, enlarged.
        rows, columns: of pictures.
        above, beside: the gaps, where numbers are and between columns.
    """

    count: int
    factor: int
    height: int
    width: int
    rows: int
    columns: int
    above: int
    beside: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of all of them."""
        rows, columns = self.rows * (self.above + self.height), self.columns * self._pitch
        return rows, columns - self.beside

    @property
    def aspect(self) -> float:
        """Height by width of all of them."""
        return self.shape[0] / self.shape[1]

    @property
    def _pitch(self) -> int:
        return self.width + self.beside

    def corner(self, number: int) -> tuple[int, int]:
        """Row and column of a picture's upper left cell."""
        row, column = divmod(number, self.columns)
        return row * (self.above + self.height) + self.above, column * self._pitch


def _layout(count: int, height: int, width: int) -> _Layout:
    """About twice as many columns as rows, and full rows where there are such."""
    least = math.ceil(math.sqrt(2 * count))
    full = [n for n in range(least, 2 * least + 1) if count % n == 0]
    columns = min(full[0] if full else least, count)
    if height == width == 1:
        columns = min(count, 16)  # single numbers need no room
    factor = math.ceil(_TILE / max(height, width))
    height, width = factor * height, factor * width
    beside = math.ceil(max(height, width) / 8)
    above = beside
    if count <= _MOST_NUMBERED:
        above = math.ceil(_NUMBER * columns * (width + beside) / _ACROSS)
    return _Layout(count, factor, height, width, -(-count // columns), columns, above, beside)


def filters(shown: LayerFilters) -> Figure:
    """See `LayerFilters.plot`."""
    weight = shown.weight.float()
    limit = float(weight.abs().max()) or 1.0
    outputs, inputs, height, width = weight.shape
    if inputs != 1 and not shown.is_color:
        return _weight_table(shown, limit)
    layout = _layout(outputs, height, width)
    exact = F.interpolate(weight, scale_factor=layout.factor, mode="nearest")
    smooth = shown.upsampled(layout.factor)
    size = (2 * _ACROSS + 1.0, _ACROSS * layout.aspect + 0.6)
    figure, axes = drawing.new_figure(1, 2, size)
    figure.get_layout_engine().set(wspace=0.06)
    titles = (
        f"{shown.layer}: {outputs} filters of {inputs} x {height} x {width}",
        "the same, upsampled bilinearly",
    )
    for panel_axes, tiles, title in zip(axes[0], (exact, smooth), titles, strict=True):
        if shown.is_color:
            tiles = (0.5 + tiles / (2 * limit)).permute(0, 2, 3, 1)
            note = f"grey: 0; black to white: {-limit:.3g} to {limit:.3g}"
            panel_axes.set_xlabel(note, fontsize=8)
        else:
            tiles = tiles[:, 0]
        drawn = _draw_tiles(panel_axes, layout, tiles.numpy(), (drawing.SIGNED, -limit, limit))
        panel_axes.set_title(title, fontsize=9)
    if not shown.is_color:
        _color_bar(axes[0, 1], drawn)
    return figure


def _weight_table(shown: LayerFilters, limit: float) -> Figure:
    """Rows of output channels, columns of the input channels that they read."""
    weight = shown.weight.float().numpy()
    outputs, inputs, height, width = weight.shape
    pitch_y, pitch_x = height + 1, width + 1
    cells = np.full((outputs * pitch_y - 1, inputs * pitch_x - 1), np.nan, dtype=np.float32)
    for output in range(outputs):
        for source in range(inputs):
            y, x = output * pitch_y, source * pitch_x
            cells[y : y + height, x : x + width] = weight[output, source]
    scale = min(10 / max(cells.shape), 0.2)  # inches of a weight
    figure, axes = drawing.new_figure(
        1, 1, (max(cells.shape[1] * scale, 3) + 1.6, max(cells.shape[0] * scale, 1.5) + 0.9)
    )
    (panel,) = axes[0]
    drawn = panel.imshow(
        cells, cmap=drawing.SIGNED, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    for axis, count, pitch, length in (
        (panel.yaxis, outputs, pitch_y, height),
        (panel.xaxis, inputs, pitch_x, width),
    ):
        labels = range(0, count, max(1, count // 16))
        axis.set_ticks([n * pitch + (length - 1) / 2 for n in labels], labels=map(str, labels))
    panel.tick_params(labelsize=8, length=0)
    of_group = " of its group" if shown.groups > 1 else ""
    panel.set_xlabel(f"input channel{of_group}", fontsize=9)
    panel.set_ylabel("output channel", fontsize=9)
    title = f"{shown.layer}: {outputs} filters of {inputs} x {height} x {width}"
    panel.set_title(title, fontsize=9)
    panel.spines[:].set_visible(False)
    _color_bar(panel, drawn)
    return figure


def activations(shown: Activations, image: int) -> Figure:
    """See `Activations.plot`."""
    groups: list[list[LayerMaps]] = []
    for layer in shown.layers:
        if not groups or layer.is_convolution:
            groups.append([])
        groups[-1].append(layer)
    columns = max(map(len, groups))
    across, first, title = _ACROSS + 0.6, 2.2, 0.4  # inches: of a layer, of the input, of a title
    layouts = [[_layout(*layer.values.shape[1:]) for layer in group] for group in groups]
    heights = [max(_ACROSS * layout.aspect for layout in row) for row in layouts]
    heights[0] = max(heights[0], first * shown.input.shape[2] / shown.input.shape[3])
    size = (first + columns * across, sum(heights) + title * len(heights))
    figure, axes = drawing.new_figure(len(groups), 1 + columns, size)
    spacing = axes[0, 0].get_gridspec()
    spacing.set_width_ratios([first] + [across] * columns)
    spacing.set_height_ratios([height + title for height in heights])
    for panel_axes in axes.flat:
        panel_axes.set_axis_off()
    _draw_input(axes[0, 0], shown.input[image].float())
    for row, group, row_layouts in zip(axes, groups, layouts, strict=True):
        for panel_axes, layer, layout in zip(row[1:], group, row_layouts, strict=False):
            _draw_layer(panel_axes, layout, layer, image)
    return figure


def _draw_input(axes: Axes, pixels: Tensor) -> None:
    axes.set_axis_on()
    if len(pixels) == 3:
        low, high = float(pixels.min()), float(pixels.max())
        cells = (pixels - low) / ((high - low) or 1.0)
        axes.imshow(cells.permute(1, 2, 0).numpy())
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        drawing.image(axes, pixels[0].numpy())
    channel = "" if len(pixels) in (1, 3) else ", channel 0"
    axes.set_title(f"input, {' x '.join(map(str, pixels.shape))}{channel}", fontsize=9)


def _draw_layer(axes: Axes, layout: _Layout, layer: LayerMaps, image: int) -> None:
    maps = layer.values[image].float()
    tiles = maps.numpy().repeat(layout.factor, axis=1).repeat(layout.factor, axis=2)
    low, high = float(maps.min()), float(maps.max())
    limit = max(-low, high) or 1.0
    scale = (drawing.SIGNED, -limit, limit) if low < 0 else (drawing.GREYS, 0.0, limit)
    axes.set_axis_on()
    dead = layer.dead.numpy()
    drawn = _draw_tiles(axes, layout, tiles, scale, dead)
    note = f", {dead.sum()} dead (red)" if dead.any() else ""
    size = " x ".join(map(str, maps.shape))
    axes.set_title(f"{layer.name} ({layer.operation}), {size}{note}", fontsize=9)
    _color_bar(axes, drawn)


def _draw_tiles(
    axes: Axes,
    layout: _Layout,
    tiles: np.ndarray,
    scale: tuple[str, float, float],
    marked: np.ndarray | None = None,
) -> AxesImage:
    """Pictures (K, h, w), or (K, h, w, 3) in colour, in rows, with their numbers above them.

    The marked ones have a red number and frame.
    """
    from matplotlib.patches import Rectangle

    height, width = layout.height, layout.width
    is_color = tiles.ndim == 4
    paper = 1.0 if is_color else np.nan
    cells = np.full(layout.shape + tiles.shape[3:], paper, dtype=np.float32)
    for number, tile in enumerate(tiles):
        y, x = layout.corner(number)
        cells[y : y + height, x : x + width] = tile
        color = drawing.HIGHLIGHT if marked is not None and marked[number] else None
        # A thin frame, for a picture may be as white as the paper.
        frame = Rectangle(
            (x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color or "#bbbbbb", lw=0.5
        )
        axes.add_patch(frame)
        if layout.count <= _MOST_NUMBERED:
            place = (x + width / 2, y - 0.1 * layout.above)
            axes.text(
                *place, str(number), ha="center", va="bottom", fontsize=6, color=color or "black"
            )
    cmap, low, high = scale
    drawn = axes.imshow(cells, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    margin = layout.beside / 2  # for the outermost frames
    axes.set_xlim(-margin, layout.shape[1] + margin)
    axes.set_ylim(layout.shape[0] + margin, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return drawn


def _color_bar(axes: Axes, drawn: AxesImage) -> None:
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.025, 1)))
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.5)
