"""Curves of a training run: losses, schedules, statistics of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import COLORS, HIGHLIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from convext.lab.activation_stats import LayerStats
    from convext.lab.lr_finder import LrFinding

FEW = 30  # points that are marked one by one, so that even a single one is seen


def plot_layer_stats(name: str, stats: LayerStats, near_zero: float) -> Figure:
    """Three panels over batches: mean, standard deviation, share near zero."""
    figure, axes = _panels(3)
    panels = (
        ("mean", stats.mean),
        ("standard deviation", stats.std),
        (f"share with |x| ≤ {near_zero:g}", stats.near_zero),
    )
    for place, (title, values) in zip(axes[0], panels, strict=True):
        _line(place, stats.batches, values)
        _whole_width(place, stats.batches)
        place.set_title(title, fontsize=9)
    axes[0, 2].set_ylim(0, 1)
    figure.suptitle(name, fontsize=10)
    return figure


def color_dim(name: str, stats: LayerStats) -> Figure:
    """The histogram of each batch as a column, the colour the logarithm of the share.

    A share is of all numbers that the histogram looked at, in its range or not: a column that is
    dark all over has its numbers elsewhere. A batch without the layer leaves its column blank.
    """
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
    shares = stats.histograms / np.maximum(stats.sampled, 1)[:, None]
    # The batches kept are evenly spaced.
    first, last = (stats.batches[0], stats.batches[-1]) if len(stats.batches) else (0, 0)
    stride = (last - first) / max(1, len(stats.batches) - 1) or 1
    return axes.imshow(
        np.log10(np.maximum(shares.T, 1e-5)),
        origin="lower",
        aspect="auto",
        extent=(first, last + stride, stats.edges[0], stats.edges[-1]),
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
    figure, axes = _panels(2)
    titles = {"lr": "learning rate", "momentum": "momentum"}
    for place, (name, title) in zip(axes[0], titles.items(), strict=True):
        _line(place, batches["step"], batches[name])
        place.set_title(title, fontsize=9)
    return figure


def plot_loss(batches: dict[str, list], epochs: list[dict[str, float]]) -> Figure:
    """Training loss of each batch and, smoothed, of its neighbours; validation's at epoch ends.

    A red line stands where a loss was not finite for the first time.
    """
    figure, axes = new_figure(1, 1, (7, 3))
    place = axes[0, 0]
    steps, losses = np.array(batches["step"], float), np.array(batches["loss"], float)
    finite = np.isfinite(losses)
    seen = np.where(finite, losses, np.nan)
    _line(place, steps, seen, linewidth=0.7, alpha=0.4, label="batch")
    # Over about a twentieth of the run: fastai's 0.98 lags far behind in a run of 100 batches.
    beta = min(0.98, 1 - 1 / max(5, len(losses) / 20))
    _line(place, steps, smoothed(losses, beta), linewidth=1.6, label="batches, smoothed")
    last_step = dict(zip(batches["epoch"], batches["step"], strict=True))
    ends = [row for row in epochs if row["epoch"] in last_step and "valid_loss" in row]
    if ends:
        where = [last_step[row["epoch"]] for row in ends]
        values = [row["valid_loss"] for row in ends]
        place.plot(where, values, "o-", color=COLORS[1], markersize=4, label="validation")
    if not finite.all():
        first = steps[~finite][0]
        place.axvline(first, color=HIGHLIGHT, linewidth=1, label="no longer finite")
        _whole_width(place, steps)
    if (seen > 0).any():
        place.set_yscale("log")
    place.set_ylabel("loss")
    place.grid(alpha=0.3, which="both")
    place.legend(fontsize=8)
    return figure


def plot_lr_finding(finding: LrFinding) -> Figure:
    """Loss over the learning rate, both logarithmic, with a line at each rate of note."""
    figure, axes = new_figure(1, 1, (7, 3.4))
    place = axes[0, 0]
    losses = np.where(np.isfinite(finding.losses), finding.losses, np.nan)
    _line(place, finding.rates, losses, linewidth=0.7, alpha=0.4, label="batch")
    _line(place, finding.rates, finding.smoothed, linewidth=1.6, label="batches, smoothed")
    marks = {
        "suggestion": finding.suggestion,
        "steepest fall": finding.steepest,
        "lowest loss": finding.lowest,
    }
    for color, (label, rate) in zip(COLORS[1:], marks.items(), strict=False):
        if rate is not None:
            label = f"{label}: {rate:.2g}"
            place.axvline(rate, color=color, linestyle="--", linewidth=1.2, label=label)
    place.set_xscale("log")
    if (losses > 0).any():
        place.set_yscale("log")
    place.set_xlabel("learning rate")
    place.set_ylabel("loss")
    place.grid(alpha=0.3, which="both")
    place.legend(fontsize=8)
    return figure


def smoothed(values: np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponentially weighted mean of what came before, without its bias towards 0.

    As fastai's Recorder smooths the training loss, with the same beta. A value that is not finite
    is left out, and gives NaN.
    """
    result, mean, weight = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(values):
        if np.isfinite(value):
            mean = beta * mean + (1 - beta) * value
            weight = beta * weight + (1 - beta)
            result[place] = mean / weight
    return result


def _panels(columns: int) -> tuple[Figure, np.ndarray]:
    figure, axes = new_figure(1, columns, (3.4 * columns, 2.8))
    figure.get_layout_engine().set(w_pad=0.12)  # inches: room for a number below the last tick
    return figure, axes


def _whole_width(place: Axes, batches: Sequence) -> None:
    """Also where there are only NaN, which matplotlib leaves out of its limits."""
    if len(batches) > 1:
        margin = 0.03 * (batches[-1] - batches[0])
        place.set_xlim(batches[0] - margin, batches[-1] + margin)


def _line(place: Axes, batches: Sequence, values: Sequence, **style: object) -> None:
    style = {"color": COLORS[0], "linewidth": 1.2, **style}
    marker = "." if len(batches) <= FEW else ""
    place.plot(batches, values, marker=marker, markersize=4, **style)
    place.set_xlabel("batch")
    place.grid(alpha=0.3)
