"""The numbers that are kept of one layer's output in one batch, measured cheaply."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

# A row: how many numbers, their mean, the sum of squared deviations from it, how many are near
# zero, how many the histogram looked at; then the bins.
COUNT, MEAN, DEVIATIONS, NEAR_ZERO, SAMPLED = range(5)
BINS = 5

# Whose output has no negative numbers, so that |x| <= t is x <= t: one comparison is saved.
NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax)


@torch.no_grad()
def measure(
    output: Tensor,
    near_zero: float,
    bins: int = 0,
    range: tuple[float, float] = (0.0, 10.0),
    sample: int | None = None,
    never_negative: bool = False,
) -> Tensor:
    """A row of a layer's output, float64 and on the output's device.

    It stays there since reading it at once would make a GPU wait for Python.

    Args:
        output: of any shape and layout, floating-point or integer.
        near_zero: counts |x| up to this.
        bins: of the histogram; 0 for none.
        range: which numbers it counts.
        sample: see `ActivationStats`.
        never_negative: promises that x >= 0.
    """
    flat = _flat(output.detach())
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    if flat.device.type == "cpu":
        row = _on_cpu(flat, near_zero, never_negative)
    else:
        row = _on_device(flat, near_zero)
    some = flat[:: _step(len(flat), sample)]
    row[SAMPLED] = len(some) if bins else 0
    return torch.cat([row, torch.histc(some, bins, *range).double()]) if bins else row


def _on_cpu(flat: Tensor, near_zero: float, never_negative: bool) -> Tensor:
    """Sum and sum of squares are ten times as fast as torch.var, NumPy's counts four times."""
    count = len(flat)
    array = flat.numpy()
    near = np.count_nonzero(array <= near_zero)
    if not never_negative:
        near -= np.count_nonzero(array < -near_zero)
    total, squares = float(flat.sum()), float(torch.dot(flat, flat))
    mean = total / count if count else math.nan
    deviations = squares - total * mean
    if not 0.1 * squares < deviations < math.inf:
        # The difference of two large numbers, or an overflow: twice the time keeps the digits.
        wide = flat.double()
        mean = float(wide.mean())
        wide -= mean
        deviations = float(torch.dot(wide, wide))
    return torch.tensor([count, mean, deviations, near, 0], dtype=torch.float64)


def _on_device(flat: Tensor, near_zero: float) -> Tensor:
    count = torch.full((), len(flat), dtype=torch.float64, device=flat.device)
    variance, mean = (x.double() for x in torch.var_mean(flat, correction=0))
    near = torch.count_nonzero(flat.abs() <= near_zero).double()
    return torch.stack([count, mean, variance * count, near, torch.zeros_like(count)])


def _flat(output: Tensor) -> Tensor:
    """All numbers in the order of memory where that saves a copy: no statistic depends on it."""
    if output.dim() == 4 and not output.is_contiguous():
        output = output.permute(0, 2, 3, 1)
    return output.reshape(-1)


def _step(count: int, sample: int | None) -> int:
    """The distance between the numbers that a histogram counts.

    It shares no divisor with the count, and so with no axis's size: else it could meet the same
    few channels or places in every image.
    """
    step = 1 if sample is None else max(1, math.ceil(count / sample))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def joined(one: Tensor, other: Tensor) -> Tensor:
    """The row of two outputs together (Chan, Golub and LeVeque 1979)."""
    row = one + other
    if one[COUNT] and other[COUNT]:
        apart = other[MEAN] - one[MEAN]
        share = other[COUNT] / row[COUNT]
        row[MEAN] = one[MEAN] + apart * share
        row[DEVIATIONS] += apart * apart * share * one[COUNT]
    else:
        row[MEAN : DEVIATIONS + 1] = (one if one[COUNT] else other)[MEAN : DEVIATIONS + 1]
    return row
