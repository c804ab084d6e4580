"""One cell written out: what it reads, by what each is multiplied, and what that comes to.

A convolution's terms come from its window: stride, padding, dilation and groups say which cells
they are, those in the padding included. Any other operation that is linear in what it reads
(a dense layer, a mean, a transposed convolution, the sum of two branches) gives its weights as the
derivative of its output. Numbers are worked out in float64 from the model's own values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convext.inspection.kinds import (
    BATCH_NORMS,
    CONV_BLOCKS,
    CONVOLUTIONS,
    MAX_POOLS,
    takes_batch_statistics,
)
from convext.inspection.step import Ref, Step
from convext.inspection.tape import Tape

_PRODUCTS = {"addmm": ("mat1", "mat2"), "mm": ("self", "mat2"), "mv": ("self", "vec")}
_LINEAR = ("avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "add", "add_", "sub", "sub_")
_COPIES = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "alias"),
    *("squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "detach", "clone", "cat"),
    *("stack", "split", "split_with_sizes", "unbind", "chunk", "repeat", "roll", "flip"),
    *("reflection_pad2d", "replication_pad2d", "upsample_nearest2d"),
    *("pixel_shuffle", "pixel_unshuffle", "contiguous"),
)


@dataclass(frozen=True, eq=False)
class Read:
    """The cells of one step that one cell of another reads, K of them.

    Attributes:
        step: the index of the step that they are of.
        name: its name.
        cells: int64 (K, axes of its value), the place of each. In a convolution's or a pool's
            padding a row or column is below 0 or beyond the last.
        inside: bool (K,), False in the padding.
        values: float64 (K,); what padding counts as is 0, or for a maximum minus infinity.
        weights: float64 (K,), what each is multiplied by; None where nothing is.
        window: how the K cells lie: a convolution's (in_channels / groups, kH, kW), a pool's
            (1, kH, kW), else (K,).
    """

    step: int
    name: str
    cells: Tensor
    inside: Tensor
    values: Tensor
    weights: Tensor | None
    window: tuple[int, ...]

    @property
    def products(self) -> Tensor:
        """Values times weights, float64 (K,).

        Raises:
            ValueError: there are no weights.
        """
        if self.weights is None:
            raise ValueError(f"the cells of {self.name} are not multiplied by weights")
        return self.values * self.weights


@dataclass(frozen=True, eq=False)
class Terms:
    """How one cell is computed.

    Attributes:
        step: the step that the cell is of; where a layer's last steps only move cells about, as
            those of a dense layer on three axes do, the one before them.
        index: the cell's place in that step's value.
        value: what the model computed.
        reads: a `Read` for each step that is read.
        rule: "sum" of products and bias; "max" of a window; "formula", worked out in `formula`;
            "copy" of another cell; "cells", where only cells and values are known.
        bias: added to the products; None where the rule is not a sum or has none.
        total: products and bias added up; None where there are none.
        formula: in words and numbers, what makes `result` of the total or of the values; "" for a
            plain sum and for "cells".
        result: what the terms come to; None for "cells".
        winner: the place of a maximum's cell, the first of equal ones; else None.
    """

    step: Step = field(repr=False)
    index: tuple[int, ...]
    value: float
    reads: tuple[Read, ...] = field(repr=False)
    rule: str = "cells"
    bias: float | None = None
    total: float | None = None
    formula: str = ""
    result: float | None = None
    winner: tuple[int, ...] | None = None

    def __str__(self) -> str:
        from convext.inspection.written import written_terms

        return written_terms(self)


def place(name: str, index: Sequence[int]) -> str:
    """A cell as text: conv2[0, 1, 5, 4]."""
    return f"{name}[{', '.join(str(int(i)) for i in index)}]"


def number(value: float, digits: int = 4) -> str:
    """A number's first digits, as short as they can be."""
    return f"{value + 0.0:.{digits}g}"  # no -0


def terms(tape: Tape, step: Step, index: tuple[int, ...]) -> Terms:
    """Writes out one cell of a step of a tape.

    Args:
        tape: from `record`.
        step: one of its steps.
        index: the cell's place in the step's value.

    Raises:
        NotImplementedError: an operation of which is not known what it reads.
    """
    step, index = _behind_moves(tape, step, index)
    if step.kind in CONVOLUTIONS + CONV_BLOCKS and not _is_transposed(step):
        return _of_convolution(tape, step, index)
    if step.kind in MAX_POOLS:
        return _of_maximum(tape, step, index)
    linear = linear_part(step)
    if linear is not None:
        return _of_linear(tape, step, index, linear)
    value, reads = float(step.value[index]), _reads(tape, step, index)
    if step.kind in ("relu", "relu_"):
        x = float(reads[0].values)
        formula, result = f"max(0, {number(x)})", max(0.0, x)
        return Terms(step, index, value, reads, "formula", formula=formula, result=result)
    if step.kind in BATCH_NORMS and not takes_batch_statistics(step):
        x = float(reads[0].values)
        formula, result = _normalised(step, index[1], x, number(x))
        return Terms(step, index, value, reads, "formula", formula=formula, result=result)
    copied = [read for read in reads if len(read.cells)]
    if step.kind in _COPIES and sum(len(read.cells) for read in copied) == 1:
        formula, result = place(copied[0].name, copied[0].cells[0]), float(copied[0].values)
        return Terms(step, index, value, reads, "copy", formula=formula, result=result)
    return Terms(step, index, value, reads)


def linear_part(step: Step) -> Callable[..., Tensor] | None:
    """The step as a linear map, its bias left out: what multiplies each cell that it reads.

    Returns:
        From float64 tensors for its inputs, each once, to its output; None if it is not linear.
    """
    if step.op is None or step.kind not in (*CONVOLUTIONS, *_PRODUCTS, *_LINEAR):
        return None
    arguments = step.named_arguments()
    if step.kind in _PRODUCTS and all(isinstance(arguments[a], Ref) for a in _PRODUCTS[step.kind]):
        return None
    constants = {"bias": None}
    if step.kind == "addmm" and isinstance(arguments["self"], Tensor):
        constants = {"self": torch.zeros_like(arguments["self"])}
    if step.kind in ("add", "add_", "sub", "sub_"):
        constants = {
            name: torch.zeros_like(addend) if isinstance(addend, Tensor) else 0
            for name, addend in arguments.items()
            if name in ("self", "other") and not isinstance(addend, Ref)
        }
    return lambda *sources: _applied(step, sources, constants)


def _applied(step: Step, sources: Sequence[Tensor], constants: dict[str, Any]) -> Tensor:
    """The step's operation in float64 on the CPU, with some arguments exchanged."""
    by_step = dict(zip(dict.fromkeys(step.inputs), sources, strict=True))
    arguments = step.named_arguments()
    arguments |= {name: value for name, value in constants.items() if name in arguments}
    if "algorithm" in arguments:
        arguments["algorithm"] = "direct"  # Winograd's transforms would round the weights
    for name, value in arguments.items():
        if isinstance(value, Ref):
            arguments[name] = by_step[value.step].clone()  # the operation may be in place
        elif isinstance(value, Tensor):
            arguments[name] = value.double().cpu()
    return step.op(**arguments)


def _behind_moves(tape: Tape, step: Step, index: tuple[int, ...]) -> tuple[Step, tuple[int, ...]]:
    """The step of the same layer, and the cell, that a layer's last steps only moved."""
    while step.kind in _COPIES and not any(step.module.children()):
        found = [(i, c) for i, c in _direct(tape, step, index).items() if c.any()]
        if len(found) != 1 or int(found[0][1].sum()) != 1:
            break
        source = tape.steps[found[0][0]]
        if source.module is not step.module or source.op is None:
            break
        step, index = source, tuple(int(i) for i in found[0][1].nonzero()[0])
    return step, index


def _direct(tape: Tape, step: Step, index: tuple[int, ...]) -> dict[int, Tensor]:
    mask = torch.zeros(step.value.shape, dtype=torch.bool)
    mask[index] = True
    return tape.reads(step.index, mask)


def _reads(
    tape: Tape,
    step: Step,
    index: tuple[int, ...],
    weights: dict[int, Tensor] | None = None,
) -> tuple[Read, ...]:
    """The cells that are read directly, in the order of their places."""
    found = []
    for source, mask in _direct(tape, step, index).items():
        count = int(mask.sum())
        found.append(
            Read(
                step=source,
                name=tape.steps[source].name,
                cells=mask.nonzero(),
                inside=torch.ones(count, dtype=torch.bool),
                values=tape.steps[source].value.cpu()[mask].double(),
                weights=None if weights is None else weights[source][mask],
                window=(count,),
            )
        )
    return tuple(found)


def _of_linear(
    tape: Tape, step: Step, index: tuple[int, ...], linear: Callable[..., Tensor]
) -> Terms:
    inputs = tuple(dict.fromkeys(step.inputs))
    zeros = [torch.zeros(tape.steps[i].value.shape, dtype=torch.float64) for i in inputs]
    with torch.enable_grad():
        sources = [zero.clone().requires_grad_() for zero in zeros]
        gradients = torch.autograd.grad(linear(*sources)[index], sources)
    reads = _reads(tape, step, index, dict(zip(inputs, gradients, strict=True)))
    with torch.no_grad():
        constant = float(_applied(step, zeros, {})[index])
    bias = constant if _has_constant(step) else None
    total = _total(reads, constant)
    value = float(step.value[index])
    return Terms(step, index, value, reads, "sum", bias=bias, total=total, result=total)


def _has_constant(step: Step) -> bool:
    factors = _PRODUCTS.get(step.kind, ())
    arguments = step.named_arguments()
    return any(
        isinstance(arguments.get(name), (Tensor, int, float))
        for name in ("bias", "self", "other")
        if name not in factors
    )


def _of_convolution(tape: Tape, step: Step, index: tuple[int, ...]) -> Terms:
    arguments = step.named_arguments()
    weight = arguments["weight"].detach().double().cpu()
    channels, *kernel = weight.shape[1:]
    first = index[1] // (weight.shape[0] // arguments["groups"]) * channels
    read = _window(tape, step, index, (first, first + channels), kernel, 0.0)
    read = replace(read, weights=weight[index[1]].reshape(-1))
    bias = None if arguments["bias"] is None else arguments["bias"][index[1]].item()
    total = _total((read,), bias or 0.0)
    formula, result = "", total
    if step.kind in CONV_BLOCKS:
        formula, result = _after_block(step, index[1], total)
    value = float(step.value[index])
    return Terms(step, index, value, (read,), "sum", bias, total, formula, result)


def _of_maximum(tape: Tape, step: Step, index: tuple[int, ...]) -> Terms:
    kernel = _repeated(step.named_arguments()["kernel_size"], 2)
    read = _window(tape, step, index, (index[-3], index[-3] + 1), kernel, -math.inf)
    best = int(read.values.argmax())  # the first of equal ones, as the operation's own
    return Terms(
        step,
        index,
        float(step.value[index]),
        (read,),
        "max",
        formula=f"max({', '.join(number(v) for v in read.values[read.inside].tolist())})",
        result=float(read.values[best]),
        winner=tuple(read.cells[best].tolist()),
    )


def _window(
    tape: Tape,
    step: Step,
    index: tuple[int, ...],
    channels: tuple[int, int],
    kernel: Sequence[int],
    padded: float,
) -> Read:
    """The cells under a kernel: its k-th on an axis is output * stride - padding + k * dilation."""
    arguments = step.named_arguments()
    source = tape.steps[step.inputs[0]]
    axes = len(kernel)
    settings = [
        _repeated(arguments[name] or kernel, axes) for name in ("stride", "padding", "dilation")
    ]
    ranges = [torch.arange(*channels)]
    for out, size, stride, padding, dilation in zip(index[-axes:], kernel, *settings, strict=True):
        ranges.append(out * stride - padding + torch.arange(size) * dilation)
    before = torch.tensor(index[: -axes - 1], dtype=torch.int64)
    grid = torch.cartesian_prod(*ranges).reshape(-1, axes + 1)
    cells = torch.cat([before.expand(len(grid), -1), grid], dim=1)
    shape = torch.tensor(source.value.shape)
    inside = ((cells >= 0) & (cells < shape)).all(1)
    values = torch.full((len(cells),), padded, dtype=torch.float64)
    values[inside] = source.value.cpu()[tuple(cells[inside].T)].double()
    window = (channels[1] - channels[0], *kernel)
    return Read(source.index, source.name, cells, inside, values, None, window)


def _repeated(setting: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (setting,) if isinstance(setting, int) else tuple(setting)
    return values * axes if len(values) == 1 else values


def _is_transposed(step: Step) -> bool:
    return bool(step.named_arguments().get("transposed", False))


def _total(reads: Sequence[Read], bias: float) -> float:
    return math.fsum([bias, *(p for read in reads for p in read.products.tolist())])


def _after_block(step: Step, channel: int, total: float) -> tuple[str, float]:
    """ReLU and batch norm of a fused block, in its order."""
    if step.named_arguments()["order"] == "conv-relu-norm":
        return _normalised(step, channel, max(0.0, total), f"max(0, {number(total)})")
    formula, result = _normalised(step, channel, total, number(total))
    return f"max(0, {formula})", max(0.0, result)


def _normalised(step: Step, channel: int, value: float, shown: str) -> tuple[str, float]:
    """Batch norm by running statistics: (input - mean) / sqrt(variance + eps) * gamma + beta."""
    arguments = step.named_arguments()

    def of_channel(*names: str, default: float | None = None) -> float:
        found = next((arguments[name] for name in names if name in arguments), None)
        return default if found is None else found[channel].item()

    prefix = "norm_" if step.kind in CONV_BLOCKS else ""
    mean, variance = of_channel("mean", "running_mean"), of_channel("var", "running_var")
    gamma = of_channel(f"{prefix}weight", default=1.0)
    beta = of_channel(f"{prefix}bias", default=0.0)
    formula = (
        f"({shown} - {_signed(mean)}) / sqrt({number(variance)} + {arguments['eps']:g}) "
        f"* {_signed(gamma)} + {_signed(beta)}"
    )
    return formula, (value - mean) / math.sqrt(variance + arguments["eps"]) * gamma + beta


def _signed(value: float) -> str:
    return f"({number(value)})" if value < 0 else number(value)
