"""Before and after: a picture, a kernel and what our conv2d makes of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convext.inspection import drawing
from convext.inspection.filters import Kernel, apply_filter, as_weight
from convext.inspection.kernels import Filter, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST_WITH_NUMBERS = 7  # cells of a kernel's side: more would be too small to read
_LARGEST_WITH_FRAMES = 100  # pixels of an image's side
_NOTES = {
    "sum": ", sum over the colours",
    "each": ", each colour by itself",
    "grey": ", of the luminance",
}
_MARK = drawing.COLORS[2]  # green, which neither scale has


def plot_filters(
    image: Tensor,
    kernels: Kernel | Sequence[Kernel],
    how: str = "sum",
    padding: str = "valid",
    at: tuple[int, int] | None = None,
    ink: bool = False,
) -> Figure:
    """Draws a row for each kernel: the picture, the kernel, the filtered picture.

    Where the kernel's weights sum to 0 the output is a difference: red is above 0, blue below (of
    a colour picture, grey is 0), on a scale that ends where 995 of 1000 numbers do. Otherwise it
    is a picture, drawn from black to white (as ink from white to black) between what the kernel
    makes of an even area as dark and as bright as any pixel of the image, and clipped beyond.

    Args:
        image: (H, W) or (C, H, W), C being 1 or 3.
        kernels: each as for `apply_filter`, also of several sizes.
        how, padding: as for `apply_filter`.
        at: row and column of a pixel, to be marked in both pictures.
        ink: draws high values dark, as MNIST's digits are shown.

    Raises:
        ValueError: as `apply_filter`, or an image with other axes.
    """
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] not in (1, 3)):
        raise ValueError(f"image must be (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    pixels = image if image.dim() == 3 else image[None]
    several = [kernels] if isinstance(kernels, (str, Filter, Tensor)) else list(kernels)
    outputs = [apply_filter(pixels, kernel, how, padding) for kernel in several]

    aspect = pixels.shape[1] / pixels.shape[2]
    row_height = min(max(2.95 * aspect, 1.5), 5.0) + 0.35
    figure, axes = drawing.new_figure(len(several), 3, (9.6, row_height * len(several)))
    for (before, middle, after), kernel, output in zip(axes, several, outputs, strict=True):
        low, high = float(pixels.min()), float(pixels.max())
        _draw_picture(before, pixels, low, high, ink)
        before.set_title(f"image, {_size(pixels)}", fontsize=9)
        numbers = as_weight(kernel, dtype=torch.float64)[0, 0]
        _draw_kernel(middle, numbers)
        name = "kernel" if isinstance(kernel, Tensor) else getattr(kernel, "name", kernel)
        middle.set_title(f"{name}, {numbers.shape[0]} x {numbers.shape[1]}", fontsize=9)
        gain = float(as_weight(kernel, len(pixels), how, torch.float64)[0].sum())
        if abs(gain) < 1e-6:
            _draw_difference(figure, after, output)
        else:
            _draw_picture(after, output, *sorted((gain * low, gain * high)), ink)
        note = _NOTES[how] if len(pixels) == 3 else ""
        after.set_title(f"output, {_size(output)}{note}", fontsize=9)
        if at is not None:
            _mark(before, after, at, tuple(numbers.shape), padding)
    return figure


def _size(picture: Tensor) -> str:
    return " x ".join(map(str, picture.shape if len(picture) > 1 else picture.shape[1:]))


def _draw_picture(axes: Axes, picture: Tensor, low: float, high: float, ink: bool) -> None:
    scale = (high - low) or 1.0
    cells = ((picture.float().cpu() - low) / scale).clamp(0, 1)
    if len(cells) == 3:
        axes.imshow(cells.permute(1, 2, 0).numpy())
    else:
        cmap = drawing.GREYS if ink else "gray"
        axes.imshow(cells[0].numpy(), cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    _bare(axes)


def _draw_difference(figure: Figure, axes: Axes, output: Tensor) -> None:
    cells = output.float().cpu()
    most, greatest = np.quantile(cells.abs().numpy(), (0.995, 1.0))
    limit = float(most or greatest or 1.0)
    if len(cells) == 3:
        axes.imshow((0.5 + cells / (2 * limit)).clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_xlabel(f"grey: 0; black to white: {-limit:.3g} to {limit:.3g}", fontsize=8)
    else:
        shown = axes.imshow(
            cells[0].numpy(),
            cmap=drawing.SIGNED,
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        extend = "both" if greatest > limit else "neither"
        bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03, extend=extend)
        bar.ax.tick_params(labelsize=8)
    _bare(axes)


def _draw_kernel(axes: Axes, numbers: Tensor) -> None:
    cells = numbers.numpy()
    drawing.image(axes, cells, signed=True)
    if max(cells.shape) > _LARGEST_WITH_NUMBERS:
        return
    limit = np.abs(cells).max()
    size = 11 if max(cells.shape) <= 3 else 7
    for (row, column), value in np.ndenumerate(cells):
        color = "white" if abs(value) > 0.6 * limit else "black"
        text = format_number(float(value))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def _mark(
    before: Axes, after: Axes, at: tuple[int, int], size: tuple[int, int], padding: str
) -> None:
    """A frame around the window, and one around the cell that comes of it.

    Where these would be specks, rings around them.
    """
    from matplotlib.patches import Rectangle

    (row, col), (height, width) = at, size
    top, left = (height - 1) // 2, (width - 1) // 2
    corner = (row - top, col - left)  # also the output's cell, where nothing is padded
    cell = corner if padding == "valid" else at
    for axes, (y, x), (h, w) in ((before, corner, size), (after, cell, (1, 1))):
        if max(before.images[0].get_array().shape[:2]) > _LARGEST_WITH_FRAMES:
            axes.plot(
                *(x + (w - 1) / 2, y + (h - 1) / 2), "o", ms=12, mfc="none", mec=_MARK, mew=1.5
            )
        else:
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=_MARK, linewidth=1.5)
            )


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
