"""Curves of a training run: losses, schedules, statistics of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

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
    shown = draw_color_dim(axes[0, 0], stats)
    axes[0, 0].set_xlabel("batch")
    axes[0, 0].set_ylabel("activation")
    axes[0, 0].set_title(name, fontsize=10)
    color_dim_bar(figure, shown, axes[0, 0])
    return figure


def draw_color_dim(axes: Axes, stats: LayerStats) -> AxesImage:
    """The picture of `color_dim` on axes of the caller's, without labels."""
    shares = stats.histograms / np.maximum(stats.histograms.sum(1, keepdims=True), 1)
    last = stats.batches[-1] + 1 if len(stats.batches) else 1
    return axes.imshow(
        np.log10(np.maximum(shares.T, 1e-5)),
        origin="lower",
        aspect="auto",
        extent=(0, last, stats.edges[0], stats.edges[-1]),
        cmap="viridis",
        vmin=-5,
        vmax=0,
        interpolation="nearest",
    )


def color_dim_bar(figure: Figure, shown: AxesImage, axes: Axes | np.ndarray) -> None:
    """What the colours of `draw_color_dim` mean, beside the axes."""
    bar = figure.colorbar(shown, ax=axes, ticks=range(-5, 1))
    bar.ax.set_yticklabels(["≤ 0.001%", "0.01%", "0.1%", "1%", "10%", "100%"])
    bar.set_label("share of the batch", fontsize=9)


def plot_sched(batches: dict[str, list]) -> Figure:
    """Two panels over batches: the learning rate and the momentum."""
    figure, axes = new_figure(1, 2, (8, 2.8))
    for place, name, title in zip(
        axes[0], ("lr", "momentum"), ("learning rate", "momentum"), strict=True
    ):
        place.plot(batches["step"], batches[name], color=COLORS[0], linewidth=1.2)
        place.set_title(title, fontsize=9)
        place.set_xlabel("batch")
        place.grid(alpha=0.3)
    return figure


def plot_loss(batches: dict[str, list], epochs: list[dict[str, float]]) -> Figure:
    """Training loss of each batch and, smoothed, of its neighbours; validation's at epoch ends."""
    figure, axes = new_figure(1, 1, (7, 3))
    place = axes[0, 0]
    steps = np.array(batches["step"], dtype=float)
    losses = np.array([np.nan if loss is None else loss for loss in batches["loss"]])
    place.plot(steps, losses, color=COLORS[0], linewidth=0.7, alpha=0.4, label="batch")
    place.plot(steps, smoothed(losses), color=COLORS[0], linewidth=1.6, label="batches, smoothed")
    ends = [
        max(s for s, e in zip(steps, batches["epoch"], strict=True) if e == row["epoch"])
        for row in epochs
        if row["epoch"] in set(batches["epoch"])
    ]
    if ends:
        valid = [row.get("valid_loss") for row in epochs if row["epoch"] in set(batches["epoch"])]
        place.plot(ends, valid, "o-", color=COLORS[1], markersize=4, label="validation")
    place.set_yscale("log")
    place.set_xlabel("batch")
    place.set_ylabel("loss (cross entropy)")
    place.grid(alpha=0.3, which="both")
    place.legend(fontsize=8)
    return figure


def smoothed(values: np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponentially weighted mean of what came before, without its bias towards 0.

    As fastai's Recorder smooths the training loss. Values that are not finite are left out.
    """
    result, mean, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        if np.isfinite(value):
            mean = beta * mean + (1 - beta) * value
            weight = beta * weight + (1 - beta)
        result[place] = mean / weight if weight else np.nan
    return result
