"""Cases: one layer and pass each, as calls of PyTorch's and of ours that do the same.

Both sides are called at the same level: functions without gradients for a forward pass, one op for
a backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import convext
from convext import functional
from convext.bench.layers import (
    BATCHES,
    LESSON_BATCHES,
    NETWORKS,
    NORM_SIZES,
    Layer,
    distinct,
    lesson,
)
from convext.bench.problem import Conv2dProblem
from convext.bench.timing import Call

STOCK = "torch"  # the name of PyTorch's call; every other is one of ours
AUTO = "auto"
WINOGRAD = "auto+winograd"  # auto as convext.allow_winograd() has it
CONV_PASSES = ("forward", "grad_input", "grad_weight")
NORM_PASSES = ("forward", "eval", "backward")


@dataclass(frozen=True)
class Case:
    """What is compared: `make(dtype, memory_format)` gives the calls by their names.

    Their tensors are on the default device, as `with torch.device("cuda")` sets it.
    """

    group: str
    part: str  # of the group: what has a goal of its own
    layer: str
    what: str  # the pass
    make: Callable[[torch.dtype, torch.memory_format], dict[str, Call]]
    ours: tuple[str, ...] = (AUTO,)  # names to time unless told otherwise
    chooses: bool = False  # does auto choose an algorithm, and can each be named?
    batch: int | None = None  # images, where a table holds those of one number
    count: int = 1  # times that the network does this
    flops: int = 0  # a multiplication and an addition being two; 0 where nobody counts
    elements: int = 0  # read once and written once
    quick: bool = True  # also part of the quick selection


def is_stock(name: str) -> bool:
    """Whether a call is PyTorch's."""
    return name.startswith(STOCK)


def algorithms() -> tuple[str, ...]:
    """Of the device on which tensors are made."""
    return convext.algorithms(torch.get_default_device())


def is_winograd(name: str) -> bool:
    """Whether "auto" takes this algorithm only where convext.allow_winograd() says so."""
    return name.startswith("winograd")


# --------------------------------------------------------------------------------------------------
# Convolutions


def mnist(batch: int | None, quick: bool) -> Iterator[Case]:
    """The lesson's layers."""
    for size in LESSON_BATCHES if batch is None else (batch,):
        layers = [Layer(problem, f"batch {size}") for problem in lesson(size)]
        yield from _conv2d_cases("mnist", layers, biased=True)


def network(group: str, batch: int | None, quick: bool) -> Iterator[Case]:
    """The different layers of a large network; quickly, one image and two layers of each part."""
    images = batch or (1 if quick else BATCHES[group])
    yield from _conv2d_cases(group, distinct(NETWORKS[group](images)), biased=group == "vgg16")


def _conv2d_cases(group: str, layers: list[Layer], biased: bool) -> Iterator[Case]:
    seen: Counter[str] = Counter()
    for layer in layers:
        problem = layer.problem
        seen[layer.part] += 1
        ours = (AUTO, WINOGRAD) if _may_be_winograds(problem) else (AUTO,)
        for conv_pass in CONV_PASSES:
            yield Case(
                group=group,
                part=layer.part,
                layer=problem.name,
                what=conv_pass,
                make=partial(conv2d_calls, problem, conv_pass, biased),
                ours=ours,
                chooses=True,
                batch=problem.N,
                count=layer.count,
                flops=2 * problem.needed_multiplications,
                elements=sum(
                    _product(size)
                    for size in (problem.input_size, problem.weight_size, problem.output_size)
                ),
                quick=seen[layer.part] <= 2 or group == "mnist",
            )


def _may_be_winograds(p: Conv2dProblem) -> bool:
    """Whether a Winograd algorithm of this build may be able to do it."""
    dense = p.kernel == (3, 3) and p.stride == (1, 1) and p.groups == 1
    return dense and any(map(is_winograd, algorithms()))


def _product(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def conv2d_calls(
    problem: Conv2dProblem,
    conv_pass: str,
    biased: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> dict[str, Call]:
    """PyTorch's call, ours, and ours by every algorithm."""
    x, w, g = (
        _random(size, dtype).to(memory_format=memory_format)
        for size in (problem.input_size, problem.weight_size, problem.output_size)
    )
    bias = _random((problem.O,), dtype) if biased else None
    names = (AUTO, WINOGRAD, *algorithms())
    ops, aten = torch.ops.convext, torch.ops.aten
    stride, padding, dilation, groups = settings = problem.settings
    if conv_pass == "forward":
        square = [axes[0] if axes[0] == axes[1] else axes for axes in settings[:3]]
        calls = {
            STOCK: lambda: F.conv2d(x, w, bias, *square, groups),
            **{
                name: partial(functional.conv2d, x, w, bias, *square, groups, algorithm=name)
                for name in names
            },
        }
    else:
        size = problem.input_size if conv_pass == "grad_input" else problem.weight_size
        wanted = [conv_pass == "grad_input", conv_pass == "grad_weight", False]
        ours = (
            partial(ops.conv2d_backward_input.default, g, w, size, *settings)
            if conv_pass == "grad_input"
            else partial(ops.conv2d_backward_weight.default, g, x, size, *settings)
        )
        calls = {
            STOCK: lambda: aten.convolution_backward.default(
                g, x, w, None, stride, padding, dilation, False, [0, 0], groups, wanted
            ),
            **{name: partial(ours, name) for name in names},
        }
    return calls


# --------------------------------------------------------------------------------------------------
# Batch norm


def batchnorm(batch: int | None, quick: bool) -> Iterator[Case]:
    """Maps after the lesson's layers, and larger and smaller ones."""
    sizes = [
        problem.output_size
        for images in ((64, 512) if batch is None else (batch,))
        for problem in lesson(images)[:-1]
    ]
    for size in [*sizes, *NORM_SIZES]:
        for what in NORM_PASSES:
            elements = _product(size)
            yield Case(
                group="batchnorm",
                part="",
                layer=" x ".join(map(str, size)),
                what=what,
                make=partial(batch_norm_calls, size, what),
                elements=(3 if what == "backward" else 2) * elements,
                quick=size[0] != 512,
            )


def batch_norm_calls(
    size: tuple[int, ...], what: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Call]:
    """Forward is training's, running statistics included; backward belongs to it."""
    channels = size[1]
    x, grad = (_random(size, dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    running = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    if what != "backward":
        training = what == "forward"
        return {
            name: partial(call, x, *running, weight, bias, training=training)
            for name, call in ((STOCK, F.batch_norm), (AUTO, functional.batch_norm))
        }
    eps = 1e-5
    _, mean, var = torch.ops.convext.batch_norm_train(x, weight, bias, eps)
    _, saved_mean, saved_scale = torch.native_batch_norm(x, weight, bias, *running, True, 0.1, eps)
    return {
        STOCK: partial(
            torch.ops.aten.native_batch_norm_backward.default,
            *(grad, x, weight, *running, saved_mean, saved_scale, True, eps, [True] * 3),
        ),
        AUTO: partial(
            torch.ops.convext.batch_norm_backward.default,
            *(grad, x, mean, var, weight, eps, True),
        ),
    }


def _random(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(_product(size))
    values = torch.randn(size, generator=generator, device="cpu")
    return values.to(torch.get_default_device(), dtype)
