"""The figures as pictures: bars of ratios, and rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no screen is needed

import numpy as np
from matplotlib import pyplot as plt

from convext.bench.machine import Peaks
from convext.bench.report import heading, label
from convext.bench.results import ON_GPU, Row

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
_MARKERS = "osD^vP*X"


def save_all(folder: Path, rows: Sequence[Row], peaks: dict[tuple[str, int], Peaks]) -> list[Path]:
    """A picture of bars for each table, and a roofline for each dtype and number of threads."""
    saved = []
    for title, grouped in groupby(rows, key=heading):
        path = folder / f"ratios-{title.replace(', ', '-').replace(' ', '')}.png"
        save_ratios(path, list(grouped), title)
        saved.append(path)
    for (dtype, threads), peak in peaks.items():
        counted = [r for r in rows if (r.dtype, r.threads) == (dtype, threads) and r.flops]
        if counted:
            path = folder / f"roofline-{dtype}-{threads or 'GPU'}.png"
            where = "GPU" if threads == ON_GPU else f"threads: {threads}"
            save_roofline(path, counted, peak, f"{dtype}, {where}")
            saved.append(path)
    return saved


def save_ratios(path: Path, rows: list[Row], title: str) -> None:
    """Bars that begin at 1, where ours and PyTorch are as fast: to the right ours is faster."""
    names = list(
        dict.fromkeys((name, layout) for r in rows for name in r.ours for layout in r.ours[name])
    )
    height = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * len(rows) * max(len(names), 2)))
    places = np.arange(len(rows))
    for number, (name, layout) in enumerate(names):
        held = [(p, r) for p, r in zip(places, rows, strict=True) if layout in r.ours.get(name, {})]
        ratios = np.array([row.ratio(name, layout) for _, row in held])
        axes.barh(
            [place + (number - (len(names) - 1) / 2) * height for place, _ in held],
            ratios - 1,
            height,
            left=1,
            color=_COLORS[number % len(_COLORS)],
            label=f"{label(name)} {layout}",
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(places, [f"{row.layer}, {row.what}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("times as fast as PyTorch's better layout")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _ticks(low: float, high: float) -> list[float]:
    """At powers of two, and between them where there are few."""
    powers = [2.0**power for power in range(-8, 9)]
    between = [1.5 * power for power in powers] if high / low < 32 else []
    fine = [0.8, 0.9, 1.1, 1.2] if high / low < 4 else []
    return [tick for tick in sorted(powers + between + fine) if low <= tick <= high]


def save_roofline(path: Path, rows: list[Row], peak: Peaks, title: str) -> None:
    """Operations per second over operations per byte, under the roof of the measured peaks."""
    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = [row.flops / row.bytes for row in rows]
    span = np.geomspace(min(intensity) / 2, max(intensity) * 2, 100)
    memory, cache = peak.copies[max(peak.copies)], max(peak.copies.values())
    for speed, style, place in ((memory, "-", "memory"), (cache, "--", "fastest cache")):
        roof = np.minimum(peak.flops, speed * span) / 1e9
        axes.plot(span, roof, style, color="black", linewidth=1, label=f"copy in {place}")
    for number, (group, grouped) in enumerate(groupby(rows, key=lambda row: row.group)):
        members = list(grouped)
        x = [row.flops / row.bytes for row in members]
        ours = [row.rate()[0] / 1e9 for row in members]
        theirs = [
            row.flops / min(np.median(times) for times in row.torch.values()) / 1e9
            for row in members
        ]
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.scatter(x, ours, s=24, c=color, marker=marker, label=group)
        hollow = {"c": "none", "edgecolors": color}
        axes.scatter(x, theirs, s=24, marker=marker, label=f"{group}, PyTorch", **hollow)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that goes in or out")
    axes.set_ylabel("GFLOP/s, better layout")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
