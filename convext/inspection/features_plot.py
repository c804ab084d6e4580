"""The picture of `features.compare`: what the descriptors see, and what it is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convext.inspection import descriptors, drawing
from convext.inspection.hough import hough_demo

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from convext.inspection.features import Comparison


def plot_comparison(comparison: Comparison) -> Figure:
    """A column for each example, then the results.

    From the top: the image with the windows of SIFT and the patches of ORB, what HOG sees, Hough's
    lines, its accumulator; below them bars.
    """
    columns = max(4, len(comparison.examples))  # as wide as the bars need
    figure, axes = drawing.new_figure(5, columns, (2.4 * columns, 12))
    for image, column in zip(comparison.examples, axes.T, strict=False):
        _draw_windows(column[0], image)
        _draw_strokes(column[1], image)
        hough = hough_demo(image)
        hough.draw_lines(column[2])
        hough.draw_votes(column[3])
    for row in axes[:4]:
        for unused in row[len(comparison.examples) :]:
            unused.set_axis_off()
    for unused in axes[4]:
        unused.remove()
    grid = axes[0, 0].get_gridspec()
    half = columns // 2
    left, right = figure.add_subplot(grid[4, :half]), figure.add_subplot(grid[4, half:])
    _draw_errors(left, comparison)
    _draw_times(right, comparison)
    figure.suptitle(f"{comparison.title}\n{comparison.setting}", fontsize=9)
    return figure


def _draw_windows(axes: Axes, image: torch.Tensor) -> None:
    """The image with the grid's points, and around two of them what SIFT and ORB read."""
    from matplotlib.patches import Rectangle

    drawing.image(axes, image[0].numpy(), "SIFT (red), ORB (blue)")
    points = descriptors.grid_points(*image.shape[1:])
    axes.plot(*zip(*points, strict=True), "+", color=drawing.HIGHLIGHT, markersize=7)
    sizes = (descriptors.SIFT_WINDOW, descriptors.ORB_PATCH / descriptors.ORB_SCALE)
    for (x, y), size, color in (
        (points[0], sizes[0], drawing.HIGHLIGHT),
        (points[4], sizes[1], drawing.COLORS[0]),
    ):
        corner = (x - size / 2, y - size / 2)
        axes.add_patch(Rectangle(corner, size, size, fill=False, color=color, linewidth=1.2))


def _draw_strokes(axes: Axes, image: torch.Tensor) -> None:
    """HOG's histograms: in each cell a stroke along each edge, as dark as the edge is strong."""
    from matplotlib.collections import LineCollection

    cells = descriptors.hog_cells(image)
    strokes, strengths = [], []
    for (row, column, number), strength in np.ndenumerate(cells / (cells.max() or 1)):
        middle = (np.array([column, row]) + 0.5) * descriptors.CELL - 0.5
        angle = (number + 0.5) * np.pi / descriptors.ORIENTATIONS + np.pi / 2  # across the gradient
        half = np.array([np.cos(angle), np.sin(angle)]) * descriptors.CELL / 2
        strokes.append((middle - half, middle + half))
        strengths.append(strength)
    drawing.image(axes, np.zeros(image.shape[1:]), "HOG: edges in each cell")
    axes.add_collection(LineCollection(strokes, colors="black", linewidths=1.5, alpha=strengths))


def _draw_errors(axes: Axes, comparison: Comparison) -> None:
    labels = [f" {row.accuracy:.2%} right" for row in comparison.rows]
    _draw_bars(axes, comparison, [100 * (1 - row.accuracy) for row in comparison.rows], labels)
    axes.set_xlabel("validation images misread, %", fontsize=8)


def _draw_times(axes: Axes, comparison: Comparison) -> None:
    microseconds = [row.seconds_per_image * 1e6 for row in comparison.rows]
    _draw_bars(axes, comparison, microseconds, [f" {value:,.0f}" for value in microseconds])
    axes.set_xlabel("to describe and classify one image, microseconds", fontsize=8)


def _draw_bars(axes: Axes, comparison: Comparison, values: list[float], labels: list[str]) -> None:
    names = [row.name for row in comparison.rows]
    bars = axes.barh(names, values, color=drawing.COLORS[: len(names)])
    axes.bar_label(bars, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xmargin(0.35)  # room for the labels
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
