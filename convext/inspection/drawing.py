"""The one style of every picture: figures without pyplot, so that no state is global.

A plotting function takes the axes or figure that it draws on, or makes one here, and returns the
figure: a notebook shows it, `figure.savefig` writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREYS = "Greys"  # images and activations: ink on paper, as MNIST's digits are
SIGNED = "RdBu_r"  # weights: red above zero, blue below, white at it
HIGHLIGHT = "#d62728"
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
DPI = 110


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None
) -> tuple[Figure, np.ndarray]:
    """A figure of its own, and its axes as an array (rows, columns).

    Args:
        rows, columns: of axes.
        size: of the figure, in inches; 3 for each of the axes by default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size or (3 * columns, 3 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def image(axes: Axes, cells: np.ndarray, title: str = "", signed: bool = False) -> None:
    """Draws a grid of numbers without ticks; signed ones with white at zero."""
    limit = float(np.abs(cells).max()) or 1.0
    low, high = (-limit, limit) if signed else (float(cells.min()), float(cells.max()))
    axes.imshow(
        cells, cmap=SIGNED if signed else GREYS, vmin=low, vmax=high, interpolation="nearest"
    )
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
