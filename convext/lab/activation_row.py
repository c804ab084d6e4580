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

HISTOGRAM_SHARE = 4  # where numbers are sampled, a histogram looks at one of so many


def taken(output: Tensor, sample: int | None) -> np.ndarray | Tensor:
    """The numbers of an output that are looked at, in one dimension and any order.

    On a CPU a copy by NumPy, or where all are looked at a view if there can be one; else a tensor.
    """
    output = output.detach()
    if output.dtype not in (torch.float32, torch.float64):
        output = output.float()
    # NumPy's views cost less than torch's.
    numbers = output.numpy() if output.device.type == "cpu" else output
    if sample is not None and output.dim() > 0:
        numbers = numbers[:: max(1, min(round(output.numel() / sample), len(numbers)))]
    if isinstance(numbers, Tensor):
        return numbers.reshape(-1)
    return (numbers if sample is None else numbers.copy(order="K")).ravel(order="K")


def measure(
    numbers: np.ndarray | Tensor,
    near_zero: float,
    bins: int = 0,
    limits: tuple[float, float] = (0.0, 10.0),
    sample: int | None = None,
    never_negative: bool = False,
) -> Tensor:
    """A row of what `taken` gave, float64 and where the numbers are.

    It stays there since reading it at once would make a GPU wait for Python.

    Args:
        near_zero: counts |x| up to this.
        bins: of the histogram; 0 for none.
        limits: between which it counts.
        sample: as for `taken`.
        never_negative: promises that x >= 0.
    """
    step = 1
    if bins and sample is not None:
        step = _coprime(math.ceil(HISTOGRAM_SHARE * len(numbers) / sample), len(numbers))
    if isinstance(numbers, Tensor):
        return _on_device(numbers, near_zero, bins, limits, step)
    return _on_cpu(numbers, near_zero, bins, limits, step, never_negative)


def _on_cpu(
    array: np.ndarray,
    near_zero: float,
    bins: int,
    limits: tuple[float, float],
    step: int,
    never_negative: bool,
) -> Tensor:
    """By NumPy: its counting takes a fourth of torch's time, its small operations a tenth."""
    count = len(array)
    near = np.count_nonzero(array <= near_zero)
    if not never_negative:
        near -= np.count_nonzero(array < -near_zero)
    # Two sums take a tenth of np.var's time.
    mean = float(array.sum()) / count if count else math.nan
    squares = float(np.dot(array, array))
    deviations = squares - count * mean * mean
    if not 0.1 * squares < deviations < math.inf:
        # The difference of two large numbers, or an overflow; this keeps the digits.
        wide = array.astype(np.float64)
        mean = float(wide.mean()) if count else math.nan
        wide -= mean
        deviations = float(np.dot(wide, wide))
    some = array[::step] if bins else array[:0]
    row = np.empty(BINS + bins)
    row[:BINS] = count, mean, deviations, near, len(some)
    if bins:
        row[BINS:] = _histogram(some, bins, limits)
    return torch.from_numpy(row)


def _histogram(array: np.ndarray, bins: int, limits: tuple[float, float]) -> np.ndarray:
    """Counts as torch.histc's in half its time; np.histogram takes twice as long."""
    low, high = (array.dtype.type(end) for end in limits)
    inside = array[(array >= low) & (array <= high)]
    places = ((inside - low) * array.dtype.type(bins) / (high - low)).astype(np.intp)
    counts = np.bincount(places, minlength=bins + 1)
    counts[bins - 1] += counts[bins]  # the upper edge belongs to the last bin
    return counts[:bins]


def _on_device(
    flat: Tensor, near_zero: float, bins: int, limits: tuple[float, float], step: int
) -> Tensor:
    """By torch alone, whose operations a GPU queues."""
    if not len(flat):
        row = torch.zeros(BINS + bins, dtype=torch.float64, device=flat.device)
        row[MEAN] = torch.nan
        return row
    some = flat[::step] if bins else flat[:0]
    count = torch.full((), len(flat), dtype=torch.float64, device=flat.device)
    variance, mean = (x.double() for x in torch.var_mean(flat, correction=0))
    near = torch.count_nonzero(flat.abs() <= near_zero).double()
    row = torch.stack([count, mean, variance * count, near, torch.full_like(count, len(some))])
    return torch.cat([row, torch.histc(some, bins, *limits).double()]) if bins else row


def _coprime(step: int, count: int) -> int:
    """The next step, from this one on, that shares no divisor with the count.

    Nor with any axis's size: else it could meet the same few channels or places of every image.
    """
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
