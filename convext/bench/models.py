"""Cases of more than one layer: the lesson's blocks and whole network, and what a call costs
besides its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext import functional
from convext.bench.cases import AUTO, STOCK, Case
from convext.bench.layers import lesson
from convext.bench.problem import Conv2dProblem
from convext.bench.timing import Call
from convext.mnist.model import lesson_cnn

BLOCK, LAYERS = "ConvBlock2d", "layers"
STEP_BATCHES = (64, 512)
STEPS = ("train", "eval")
BLOCK_PASSES = ("eval", "forward", "forward+backward")
CALLS = ("no_grad", "forward", "forward+backward")
ORDERS = ("conv-relu-norm", "conv-norm-relu")


def step(batch: int | None, quick: bool) -> Iterator[Case]:
    """The whole network: forward, loss, backward and SGD; and its evaluation."""
    for images in STEP_BATCHES if batch is None else (batch,):
        for what in STEPS:
            yield Case(
                group="step",
                part=f"batch {images}",
                layer="lesson CNN",
                what=what,
                make=partial(step_calls, images, what),
                ours=(BLOCK, LAYERS),
                batch=images,
            )


def step_calls(
    batch: int, what: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Call]:
    """Stock layers, our layers, and our layers in fused blocks; all of the same initial state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = lesson_cnn("torch").state_dict()
        images = torch.randn(batch, 1, 28, 28).to(dtype, memory_format=memory_format)
        labels = torch.randint(10, (batch,))

    def call(layers: str, fused: bool = False) -> Call:
        model = lesson_cnn(layers)
        model.load_state_dict(state)
        model = convext.fuse(model) if fused else model
        model.to(dtype, memory_format=memory_format).train(what == "train")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def train() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return train if what == "train" else torch.no_grad()(partial(model, images))

    return {STOCK: call("torch"), BLOCK: call("convext", fused=True), LAYERS: call("convext")}


def block(batch: int | None, quick: bool) -> Iterator[Case]:
    """Convolution, ReLU and batch norm of each of the lesson's layers, as one and as three."""
    for images in STEP_BATCHES if batch is None else (batch,):
        for order in ORDERS:
            for problem in lesson(images)[:-1]:
                for what in BLOCK_PASSES:
                    yield Case(
                        group="block",
                        part=f"batch {images}, {order}",
                        layer=f"{problem.name}, {order}",
                        what=what,
                        make=partial(block_calls, problem, order, what),
                        ours=(BLOCK, LAYERS),
                        batch=images,
                        quick=images == 64 and order == ORDERS[0],
                    )


def block_calls(
    problem: Conv2dProblem,
    order: str,
    what: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> dict[str, Call]:
    """PyTorch's three layers, our block and our three layers."""
    x = torch.randn(problem.input_size).to(dtype, memory_format=memory_format)
    x.requires_grad_(what == "forward+backward")
    grad = torch.randn(problem.output_size).to(dtype, memory_format=memory_format)

    conv = nn.Conv2d(problem.C, problem.O, problem.kernel, problem.stride, problem.padding)
    norm, relu = nn.BatchNorm2d(problem.O), nn.ReLU()
    stock = nn.Sequential(conv, *((relu, norm) if order == ORDERS[0] else (norm, relu)))

    def call(model: nn.Module) -> Call:
        model.to(dtype, memory_format=memory_format).train(what != "eval")
        parameters = [x, *model.parameters()]
        if what == "forward+backward":
            return lambda: torch.autograd.grad(model(x), parameters, grad)
        return torch.set_grad_enabled(what == "forward")(partial(model, x))

    return {
        STOCK: call(deepcopy(stock)),
        BLOCK: call(convext.fuse(deepcopy(stock))),
        LAYERS: call(convext.replace_layers(stock)),
    }


def overhead(batch: int | None, quick: bool) -> Iterator[Case]:
    """One convolution of a 1x1x4x4 input: next to no arithmetic."""
    for what in CALLS:
        yield Case(
            group="overhead",
            part="",
            layer="3x3, 1 to 1 at 4x4",
            what=what,
            make=partial(overhead_calls, what),
        )


def overhead_calls(
    what: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Call]:
    """PyTorch's function and ours."""
    x, w, b = (torch.randn(size, dtype=dtype) for size in ((1, 1, 4, 4), (1, 1, 3, 3), (1,)))
    x, w = (tensor.to(memory_format=memory_format) for tensor in (x, w))
    grad = torch.ones(1, 1, 2, 2, dtype=dtype)
    operands = [tensor.requires_grad_(what != "no_grad") for tensor in (x, w, b)]

    def call(conv2d) -> Call:
        if what == "forward+backward":
            return lambda: torch.autograd.grad(conv2d(*operands), operands, grad)
        return lambda: conv2d(*operands)

    return {STOCK: call(F.conv2d), AUTO: call(functional.conv2d)}
