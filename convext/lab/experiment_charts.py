"""Plots of an experiment's results: a panel for each thing that it looks at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from convext.inspection.drawing import COLORS, new_figure
from convext.lab.charts import color_dim_bar, draw_color_dim, smoothed
from convext.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def plot_results(results: Results) -> Figure:
    """The panels that the experiment asks for, or the histograms of every variant."""
    panels = results.experiment.panels
    if panels == ("color_dim",):
        return _plot_color_dim(results)
    count = len(results.trained)
    height = max(3.2, 1.4 + 0.36 * count)
    figure, axes = new_figure(1, len(panels), (4.8 + 2.8 * len(panels), height))
    draw = {"error": _draw_error, "loss": _draw_loss, "time": _draw_time}
    for place, panel in zip(axes[0], panels, strict=True):
        draw[panel](place, results)
    return figure


def _colors(results: Results) -> dict[str, str]:
    return {label: COLORS[n % len(COLORS)] for n, label in enumerate(results.trained)}


def _draw_points(axes: Axes, results: Results, values: dict[str, np.ndarray]) -> None:
    """A row for each variant: a point for each seed, and a bar at their mean."""
    colors = _colors(results)
    for row, label in enumerate(results.trained):
        found = values[label]
        axes.plot(found, np.full(len(found), row), "o", color=colors[label], alpha=0.6, zorder=3)
        axes.plot([found.mean()] * 2, [row - 0.3, row + 0.3], color=colors[label], linewidth=2)
    axes.set_yticks(range(len(results.trained)), results.trained, fontsize=9)
    axes.set_ylim(len(results.trained) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x", which="both")


def _draw_error(axes: Axes, results: Results) -> None:
    errors = {label: 100 * (1 - results.values(label, "accuracy")) for label in results.trained}
    _draw_points(axes, results, errors)
    axes.set_xlabel("validation error, %")
    every = np.concatenate(list(errors.values()))
    if every.min() > 0 and every.max() > 4 * every.min():
        axes.set_xscale("log")
        low, high = every.min() / 1.3, min(100.0, every.max() * 1.3)
        axes.set_xlim(low, high)
        _plain_log_ticks(axes.xaxis)


def _draw_time(axes: Axes, results: Results) -> None:
    values = {label: results.values(label, "time_ratio") for label in results.trained}
    _draw_points(axes, results, values)
    axes.set_yticks(range(len(results.trained)), [""] * len(results.trained))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"CPU time, {results.trained[0]} being 1")


def _draw_loss(axes: Axes, results: Results) -> None:
    """Against images seen, since steps are not of one size; colours are the error panel's."""
    colors = _colors(results)
    top = 0.0
    for number, label in enumerate(results.trained):
        losses = [np.array(run.losses, dtype=float) for run in results.of(label)]
        size = results.settings["batch_sizes"][label]
        images = size * np.arange(1, len(losses[0]) + 1) / 1000
        # About as many images in the running mean, whatever the size of a step.
        beta = min(0.9, 0.9 ** (size * 117 / 60_000)) if len(images) > 40 else 0.5
        curves = np.array([smoothed(loss, beta) for loss in losses])
        width = max(1.2, 3 - 0.9 * number)  # so that a curve below another is seen
        axes.plot(images, curves.mean(0), color=colors[label], linewidth=width)
        axes.fill_between(
            images, curves.min(0), curves.max(0), color=colors[label], alpha=0.15, linewidth=0
        )
        top = max(top, float(np.nanmean(losses[0][:1])))
    axes.set_yscale("log")
    axes.set_ylim(top=2 * max(top, math.log(10)))
    _plain_log_ticks(axes.yaxis)
    axes.set_xlabel("images seen, thousands")
    axes.set_ylabel("training loss, smoothed")
    axes.grid(alpha=0.3, which="both")


def _plain_log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... as such, where matplotlib writes powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _plot_color_dim(results: Results) -> Figure:
    """The histograms of the deepest activation, a panel for each variant: its worst run's."""
    shown = [run for run in results.runs if run.activations is not None]
    shown.sort(key=lambda run: results.labels.index(run.variant))
    columns = 2
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(rows, columns, (10, 2.1 * rows + 0.5))
    for place in axes.flat[len(shown) :]:
        place.set_axis_off()
    for place, run in zip(axes.flat, shown, strict=False):
        drawn = draw_color_dim(place, run.activations)
        accuracy = f"accuracy {run.figures['accuracy']:.1%}"
        place.set_title(f"{run.variant}, seed {run.seed}: {accuracy}", fontsize=9)
    for place in axes[:, 0]:
        place.set_ylabel("activation", fontsize=9)
    for place in axes[-1]:
        place.set_xlabel("batch", fontsize=9)
    color_dim_bar(figure, drawn, axes)
    return figure
