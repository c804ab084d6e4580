"""Curves of a training run: losses, schedules, statistics of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convext.lab.activation_stats import LayerStats


def plot_layer_stats(name: str, stats: LayerStats, near_zero: float) -> Figure:
    """Three panels over batches: mean, standard deviation, share near zero."""
    figure, axes = new_figure(1, 3, (10, 2.8))
    panels = (
        ("mean", stats.mean),
        ("standard deviation", stats.std),
        (f"share with |x| ≤ {near_zero:g}", stats.near_zero),
    )
    for place, (title, values) in zip(axes[0], panels, strict=True):
        place.plot(stats.batches, values, color=COLORS[0], linewidth=1)
        place.set_title(title, fontsize=9)
        place.set_xlabel("batch")
        place.grid(alpha=0.3)
    axes[0, 2].set_ylim(0, 1)
    figure.suptitle(name, fontsize=10)
    return figure


def color_dim(name: str, stats: LayerStats) -> Figure:
    """The histogram of each batch as a column, the colour the logarithm of the share."""
    if stats.histograms is None:
        raise ValueError(f"{name}: color_dim needs histograms, and none were collected")
    figure, axes = new_figure(1, 1, (7, 3))
    shares = stats.histograms / np.maximum(stats.histograms.sum(1, keepdims=True), 1)
    last = stats.batches[-1] + 1 if len(stats.batches) else 1
    shown = axes[0, 0].imshow(
        np.log10(np.maximum(shares.T, 1e-5)),
        origin="lower",
        aspect="auto",
        extent=(0, last, stats.edges[0], stats.edges[-1]),
        cmap="viridis",
        vmin=-5,
        vmax=0,
        interpolation="nearest",
    )
    axes[0, 0].set_xlabel("batch")
    axes[0, 0].set_ylabel("activation")
    axes[0, 0].set_title(name, fontsize=10)
    bar = figure.colorbar(shown, ax=axes[0, 0], ticks=range(-5, 1))
    bar.ax.set_yticklabels(["≤ 0.001%", "0.01%", "0.1%", "1%", "10%", "100%"])
    bar.set_label("share of the batch", fontsize=9)
    return figure
