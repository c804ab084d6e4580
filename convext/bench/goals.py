"""What the figures should be, in one place, and whether they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from convext.bench.cases import AUTO, CONV_PASSES, WINOGRAD, is_stock, is_winograd
from convext.bench.layers import WINOGRAD_LARGE, WINOGRAD_SMALL
from convext.bench.models import BLOCK
from convext.bench.results import (
    BETTER,
    CHANNELS_LAST,
    NCHW,
    ON_GPU,
    Row,
    geometric_mean,
    regret,
)

REGRET = 1.05  # at most, in the geometric mean
NOISE = 0.03  # by which a figure for several threads may lie below the one for one thread


@dataclass(frozen=True)
class Goal:
    """A geometric mean over all float32 cases of some parts of some groups, on the CPU."""

    title: str
    what: str  # the pass
    at_least: float  # times as fast as PyTorch
    groups: tuple[str, ...]
    parts: tuple[str, ...] = ()  # all where empty
    name: str = AUTO  # which of our calls
    against: str = BETTER  # which of PyTorch's layouts
    each: float = 0.0  # what every single case must reach

    def covers(self, row: Row) -> bool:
        return (
            row.group in self.groups
            and (not self.parts or row.part in self.parts)
            and row.what == self.what
            and row.dtype == "float32"
            and row.threads != ON_GPU
        )


def _conv(title, values, groups, parts, name=AUTO, each=(0.0, 0.0, 0.0)) -> list[Goal]:
    return [
        Goal(title, what, value, groups, parts, name, each=least)
        for what, value, least in zip(CONV_PASSES, values, each, strict=True)
    ]


_LARGE = ("resnet50", "vgg16")
_REST = ("1x1", "strided or small")

GOALS: tuple[Goal, ...] = (
    *_conv("mnist, batch 64", (2.5, 3.5, 2.3), ("mnist",), ("batch 64",)),
    *_conv("mnist, batch 512", (2.0, 2.5, 1.5), ("mnist",), ("batch 512",)),
    *_conv("mnist, batch 1", (3.0, 3.0, 3.0), ("mnist",), ("batch 1",)),
    *_conv(WINOGRAD_LARGE, (2.5, 2.5, 1.5), _LARGE, (WINOGRAD_LARGE,), WINOGRAD),
    *_conv(WINOGRAD_SMALL, (1.8, 1.8, 1.2), _LARGE, (WINOGRAD_SMALL,), WINOGRAD),
    *_conv("resnet50/vgg16 otherwise", (1.05, 1.05, 1.1), _LARGE, _REST, each=(0.95, 0.0, 0.0)),
    *_conv("3 input channels", (1.1, 3.0, 1.5), _LARGE, ("3 input channels",)),
    *_conv("mobilenet depthwise", (1.5, 1.5, 1.5), ("mobilenet",), ("depthwise",)),
    Goal("batch norm", "forward", 8.0, ("batchnorm",), against=NCHW),
    Goal("batch norm", "forward", 1.6, ("batchnorm",), against=CHANNELS_LAST),
    Goal("batch norm", "backward", 3.0, ("batchnorm",), against=NCHW),
    Goal("batch norm", "backward", 1.5, ("batchnorm",), against=CHANNELS_LAST),
    Goal("MNIST train step", "train", 3.0, ("step",), ("batch 64",), BLOCK),
    Goal("MNIST train step", "train", 2.5, ("step",), ("batch 512",), BLOCK),
    Goal("epoch of `convext train`", "train_seconds", 2.0, ("epoch",)),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and its figures on one number of threads."""

    goal: Goal
    threads: int
    cases: int
    figures: dict[str, float]  # our layout -> geometric mean
    worst: dict[str, float]  # our layout -> the least of the cases
    needed: dict[str, float]  # our layout -> what the figure should be
    held_to_one_thread: bool  # that is, to the figure of one, instead of the goal's own

    @property
    def met_in(self) -> list[str]:
        """Our layouts in which the goal is met."""
        slack, each = (NOISE, 0.0) if self.held_to_one_thread else (0.0, self.goal.each)
        return [
            layout
            for layout, figure in self.figures.items()
            if figure >= self.needed[layout] * (1 - slack) and self.worst[layout] >= each
        ]

    @property
    def verdict(self) -> str:
        """Met, in every layout or in one of them; missed; or not measured."""
        if not self.cases:
            return "not measured"
        met = self.met_in
        if len(met) == len(self.figures):
            return "met"
        return f"met in {', '.join(met)} only" if met else "missed"


def judge(rows: Iterable[Row], goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """Every goal, for one thread; for more threads those that were measured, whose figures should
    be no worse than one thread's.
    """
    rows = list(rows)
    verdicts = []
    for goal in goals:
        covered = [row for row in rows if goal.covers(row)]
        counts = sorted({row.threads for row in covered})
        single = None
        for threads in counts or [1]:
            members = [row for row in covered if row.threads == threads]
            verdict = _judge(goal, threads, members, single)
            verdicts.append(verdict)
            single = verdict if threads == 1 else single
    return verdicts


def _judge(goal: Goal, threads: int, rows: list[Row], single: Verdict | None) -> Verdict:
    ratios: dict[str, list[float]] = {}
    for row in rows:
        name = goal.name if goal.name in row.ours else AUTO
        for layout in row.ours.get(name, {}):
            if goal.against in (BETTER, layout):
                ratios.setdefault(layout, []).append(row.ratio(name, layout, goal.against))
    figures = {layout: geometric_mean(values) for layout, values in ratios.items()}
    held = single is not None and set(figures) <= set(single.figures)
    return Verdict(
        goal,
        threads,
        cases=max(map(len, ratios.values()), default=0),
        figures=figures,
        worst={layout: min(values) for layout, values in ratios.items()},
        needed=single.figures if held else dict.fromkeys(figures, goal.at_least),
        held_to_one_thread=held,
    )


def auto_regret(rows: Iterable[Row], allowing_winograd: bool = False) -> float:
    """Geometric mean over all rows and layouts for which there was a choice; NaN without any.

    With Winograd allowed, the rows are those that some Winograd algorithm can do.
    """
    values = []
    for row in rows:
        names = [
            name
            for name in row.ours
            if name not in (AUTO, WINOGRAD)
            and not is_stock(name)
            and (allowing_winograd or not is_winograd(name))
        ]
        auto = WINOGRAD if allowing_winograd else AUTO
        values += [regret(row, layout, names, auto) for layout in row.ours.get(auto, {})]
    return geometric_mean(value for value in values if value is not None)
