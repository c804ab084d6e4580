"""Receptive fields along one axis of the image, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, inf, lcm


@dataclass(frozen=True)
class Axis:
    """Which pixels a row of cells reads, whatever the image's size: cell i from low(i) to high(i).

    Pixels count from 0; below 0 and beyond the image lies what padding stands for. Fields repeat
    every `len(lows)` cells, `advance` pixels further on. Convolutions and pools keep that period at
    1, and then `read` is the recursion of Araujo, Norris and Sim, "Computing Receptive Fields of
    Convolutional Neural Networks" (Distill, 2019): u' = s u - p, v' = s v - p + d (k - 1). What
    enlarges the grid has longer periods: after a transposed convolution of stride 2, even and odd
    cells read differently.

    Attributes:
        lows, highs: first and last pixel of the cells of one period; inf and -inf where a cell
            reads nothing.
        advance: pixels from one period to the next; 0 where every cell reads the same.
    """

    lows: tuple[float, ...]
    highs: tuple[float, ...]
    advance: int

    @staticmethod
    def pixels() -> Axis:
        """The image itself: cell i is pixel i."""
        return Axis((0,), (0,), 1)

    @staticmethod
    def constant(low: float, high: float) -> Axis:
        """Every cell reads the same pixels."""
        return Axis((low,), (high,), 0)

    def low(self, cell: int) -> float:
        turns, phase = divmod(cell, len(self.lows))
        return self.lows[phase] + turns * self.advance

    def high(self, cell: int) -> float:
        turns, phase = divmod(cell, len(self.highs))
        return self.highs[phase] + turns * self.advance

    @property
    def jump(self) -> Fraction:
        """Pixels from one cell to the next: the effective stride."""
        return Fraction(self.advance, len(self.lows))

    @property
    def size(self) -> int:
        """Pixels of the largest field, padding included."""
        fields = zip(self.lows, self.highs, strict=True)
        return max(0 if low > high else int(high - low) + 1 for low, high in fields)

    def covered(self, cells: int) -> tuple[float, float]:
        """First and last pixel that the cells from 0 on read together."""
        return min(map(self.low, range(cells))), max(map(self.high, range(cells)))

    def read(self, cells: int, steps: int, taps: Callable[[int], Iterable[int]]) -> Axis:
        """The fields of cells that read cells of this axis.

        Args:
            cells: after so many of them the pattern repeats, `steps` cells of this axis further on.
            taps: cell -> the cells that it reads, for cells of one pattern. They may lie before 0
                or beyond the end, in the padding, which counts as more of the same.
        """
        turns = len(self.lows) // gcd(len(self.lows), steps)
        reads = [
            [tap + turn * steps for tap in taps(cell)]
            for turn in range(turns)
            for cell in range(cells)
        ]
        return Axis(
            tuple(min(map(self.low, tap), default=inf) for tap in reads),
            tuple(max(map(self.high, tap), default=-inf) for tap in reads),
            self.advance * steps * turns // len(self.lows),
        )

    def window(self, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
        """The fields of a convolution's or pool's cells."""
        return self.read(1, stride, lambda _: [-padding + dilation * k for k in range(kernel)])

    def transposed(self, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
        """The fields of a transposed convolution's cells."""

        def taps(cell: int) -> list[int]:
            places = [cell + padding - dilation * k for k in range(kernel)]
            return [place // stride for place in places if place % stride == 0]

        return self.read(stride, 1, taps)

    def union(self, other: Axis) -> Axis | None:
        """Of cells that read both; None where these drift apart, since their jumps differ."""
        if self.jump != other.jump:
            return None
        period = lcm(len(self.lows), len(other.lows))
        return Axis(
            tuple(min(self.low(i), other.low(i)) for i in range(period)),
            tuple(max(self.high(i), other.high(i)) for i in range(period)),
            int(self.jump * period),
        )
