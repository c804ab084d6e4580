"""Where the image's axes lie in a tensor, and what the cells along them read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from convext.inspection.field_axis import Axis


@dataclass(frozen=True)
class Place:
    """Where an axis of the image is found in a tensor, and what its cells read.

    Attributes:
        dim: the tensor's dimension; None where all cells read the same along this axis.
        cells: how many there are along it.
        outer, inner: sizes of what else that dimension holds, before the axis and after it, in
            row-major order. Flattening joins dimensions; else they are 1.
    """

    axis: Axis
    dim: int | None
    cells: int
    outer: int = 1
    inner: int = 1

    @property
    def alone(self) -> bool:
        return self.outer == self.inner == 1

    def constant(self) -> Place:
        """Of a cell that reads all of these."""
        return Place(Axis.constant(*self.axis.covered(self.cells)), None, 1)


@dataclass(frozen=True)
class Fields:
    """The receptive fields of a tensor's cells.

    Attributes:
        places: of the image's rows (H) and columns (W).
        uniform: whether all channels read alike; else `places` have what they read together.
    """

    places: tuple[Place, Place]
    uniform: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """Of the largest field: (height, width)."""
        return tuple(place.axis.size for place in self.places)

    def jump(self, dims: int) -> tuple[Fraction, Fraction] | None:
        """From one cell's field to the next one's; None where the tensor is not a grid.

        Args:
            dims: of the tensor. The last two of a grid are its rows and columns.
        """
        for place, dim in zip(self.places, (dims - 2, dims - 1), strict=True):
            if place.dim is not None and (place.dim != dim or not place.alone):
                return None
        return tuple(place.axis.jump for place in self.places)


class UnknownFieldsError(Exception):
    """Arithmetic has no answer."""


def gathered(source: Fields, dims: set[int]) -> Fields:
    """Each cell reads all along some dimensions."""
    return replace(
        source, places=tuple(p.constant() if p.dim in dims else p for p in source.places)
    )


def broadcast(source: Fields, shape: Sequence[int], to: Sequence[int]) -> Fields:
    """Of a tensor of some shape, repeated to a larger one."""

    def repeated(place: Place) -> Place:
        if place.dim is None:
            return place
        dim = place.dim + len(to) - len(shape)
        repeats = to[dim] != shape[place.dim]
        return place.constant() if repeats else replace(place, dim=dim)

    return replace(source, places=tuple(map(repeated, source.places)))


def merged(sources: Sequence[Fields]) -> Fields:
    """Of cells that read a cell of each."""
    found, *others = sources
    for other in others:
        places = zip(found.places, other.places, strict=True)
        found = Fields(tuple(_both(*pair) for pair in places), found.uniform and other.uniform)
    return found


def _both(one: Place, other: Place) -> Place:
    if replace(one, axis=other.axis) == other:
        axis = one.axis.union(other.axis)
        if axis is not None:
            return replace(one, axis=axis)
    # One that reads the same for all cells may have in it all that the other's cells read.
    for whole, part in ((one, other), (other, one)):
        low, high = part.axis.covered(part.cells)
        if whole.dim is None and whole.axis.low(0) <= low and high <= whole.axis.high(0):
            return whole
    raise UnknownFieldsError
