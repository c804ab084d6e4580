"""The formulas of a spreadsheet for each operation that a model applies.

A rule takes a step of a tape, the places of its inputs' cells (see text.py) and the page. It writes
the step's weights and formulas there, and returns the places of its value's cells, in the value's
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from convext.inspection import kinds
from convext.inspection.spreadsheet.elementwise import (
    arithmetic,
    movement,
    padding,
    pointwise,
    reduction,
    same,
    softmax,
)
from convext.inspection.spreadsheet.layers import (
    adaptive_pool,
    batch_norm,
    convolution,
    dense,
    pool,
)
from convext.inspection.spreadsheet.page import Page, planes
from convext.inspection.step import Step

Rule = Callable[[Step, Sequence[Tensor], Page], Tensor]

_MOVEMENTS = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t"),
    *("squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "cat", "stack", "split"),
    *("split_with_sizes", "unbind", "chunk", "repeat", "flip", "roll", "reflection_pad2d"),
    *("replication_pad2d", "upsample_nearest2d", "pixel_shuffle", "pixel_unshuffle", "alias"),
)
_COPIES = ("clone", "_to_copy", "contiguous", "detach", "dropout", "lift_fresh")

RULES: dict[str, Rule] = {
    **dict.fromkeys(kinds.CONVOLUTIONS, convolution),
    **dict.fromkeys(("addmm", "mm"), dense),
    **dict.fromkeys(kinds.BATCH_NORMS, batch_norm),
    **dict.fromkeys(kinds.MAX_POOLS, partial(pool, "MAX")),
    **dict.fromkeys(kinds.MEAN_POOLS, partial(pool, "AVERAGE")),
    "_adaptive_avg_pool2d": partial(adaptive_pool, "AVERAGE"),
    "adaptive_max_pool2d": partial(adaptive_pool, "MAX"),
    "mean": partial(reduction, "AVERAGE"),
    "sum": partial(reduction, "SUM"),
    "amax": partial(reduction, "MAX"),
    "_softmax": partial(softmax, False),
    "_log_softmax": partial(softmax, True),
    "relu": partial(pointwise, "MAX(0,{0})"),
    "hardtanh": partial(pointwise, "MIN({max_val},MAX({min_val},{0}))"),
    "leaky_relu": partial(pointwise, "IF({0}>0,{0},{0}*{negative_slope})"),
    "sigmoid": partial(pointwise, "1/(1+EXP(-{0}))"),
    "tanh": partial(pointwise, "TANH({0})"),
    "exp": partial(pointwise, "EXP({0})"),
    "add": partial(arithmetic, "+"),
    "sub": partial(arithmetic, "-"),
    "mul": partial(arithmetic, "*"),
    "div": partial(arithmetic, "/"),
    "constant_pad_nd": padding,
    **dict.fromkeys(_MOVEMENTS, movement),
    **dict.fromkeys(_COPIES, same),
}


def rule(step: Step) -> Rule:
    """How one step is written.

    Raises:
        NotImplementedError: an operation that is not known here.
    """
    kind = step.kind if step.kind in RULES else step.kind.removesuffix("_")  # in place or not
    if kind not in RULES:
        raise NotImplementedError(f"{step.name}: no formula is known for {step.op}")
    return RULES[kind]


def input_cells(step: Step, page: Page) -> Tensor:
    """The input, which is numbers."""
    page.begin("input", " x ".join(map(str, step.value.shape)))
    grids = planes(step.value)
    cells = page.numbers(grids, page.tops(len(grids), grids.shape[1]), "channel")
    page.color(cells, grids, signed=False)
    page.end()
    return cells.reshape(step.value.shape)
