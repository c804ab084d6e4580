"""Where the time of a training step goes, by kinds of operations, as torch.profiler sees it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "convext training step"
_BACKWARD = "autograd::engine::evaluate_function: "

# What a step does -> the operations, stock ones and ours, as the profiler names them. What none of
# these names is "other operations", and what is in no operation at all is Python's.
KINDS = {
    "convolutions, forward": r"(convext|aten)::_?conv\w*|convext::conv_block\w*",
    "convolutions, backward": rf"{_BACKWARD}(Convolution\w*|.*convext::Conv(2d|Block)\w*>?)",
    "batch norm, forward": r"(convext|aten)::(native_|cudnn_)?batch_norm\w*|"
    r"convext::update_running_statistics",
    "batch norm, backward": rf"{_BACKWARD}(\w*BatchNorm\w*|.*convext::\w*BatchNorm\w*>?)",
    "ReLU, both ways": rf"aten::(relu_?|clamp_min_?)|{_BACKWARD}Relu\w*",
    "loss, both ways": rf"aten::cross_entropy_loss|{_BACKWARD}(NllLoss|LogSoftmax)\w*",
    "optimiser": r"Optimizer\..*",
    "cutting a batch from the data": r"aten::index_select",
}
OTHER = "other operations"
PYTHON = "Python, between operations"
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


@dataclass(frozen=True)
class OpTimes:
    """The time of one training step on a CPU, by what it was spent on.

    Attributes:
        seconds: of each kind of work that took any, the longest first; each is the median of the
            steps'.
        batch: images in a step.
        steps: how many were looked at.
        threads: that torch used.
    """

    seconds: dict[str, float]
    batch: int
    steps: int
    threads: int

    @property
    def total(self) -> float:
        """Seconds of a step: the sum of all kinds."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        width = max(map(len, self.seconds))
        return "\n".join(
            f"{kind:{width}} {1000 * seconds:9.2f} ms {seconds / self.total:6.1%}"
            for kind, seconds in self.seconds.items()
        )


def measure_op_times(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    batch: int,
    steps: int = 5,
    warm_up: int = 2,
) -> OpTimes:
    """Trains a copy of a model for a few steps under torch's profiler.

    The profiler itself takes some microseconds for each operation, which count as part of it or as
    Python's.

    Args:
        model: a classifier, on the CPU. It is left as it was, and so is torch's generator.
        images, labels: what batches are cut from, at random: (N, C, H, W) and (N,).
        make_optimizer: makes that of the copy.
        batch: images in a step; not more than there are.
        steps: that are measured.
        warm_up: steps before these.

    Raises:
        ValueError: a batch or a number of steps below 1, or a model that is not on the CPU.
    """
    if batch < 1 or steps < 1:
        raise ValueError(f"batch and steps must be at least 1, got {batch} and {steps}")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError("model must be on the CPU, whose time is measured")
    batch = min(batch, len(images))
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(model)

    def step(order: Tensor) -> None:
        x, y = images.index_select(0, order), labels.index_select(0, order)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.random.fork_rng(devices=()), torch.enable_grad():
        orders = [torch.randperm(len(images))[:batch] for _ in range(warm_up + steps)]
        for order in orders[:warm_up]:
            step(order)
        with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            for order in orders[warm_up:]:
                with record_function(_STEP):
                    step(order)
    measured = [_split(event) for event in profiler.events() if event.name == _STEP]
    kinds = {kind: median(times[kind] for times in measured) for kind in measured[0]}
    longest = sorted(kinds.items(), key=lambda item: -item[1])
    return OpTimes(
        {kind: seconds for kind, seconds in longest if seconds > 0},
        batch,
        steps,
        torch.get_num_threads(),
    )


def _split(step: FunctionEvent) -> dict[str, float]:
    """A step's seconds by kinds; what an operation calls is part of it."""
    times = dict.fromkeys([*KINDS, OTHER, PYTHON], 0.0)
    for event in step.cpu_children:
        times[_kind(event.name)] += event.cpu_time_total / 1e6
    times[PYTHON] = max(step.cpu_time_total / 1e6 - sum(times.values()), 0.0)
    return times


def _kind(name: str) -> str:
    return next((kind for kind, names in _KINDS.items() if names.fullmatch(name)), OTHER)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Within the block, Kineto does not write to the terminal that it starts and stops.

    It looks at the variable when it is first used in a process.
    """
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
