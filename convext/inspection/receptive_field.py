"""Receptive fields: which pixels of the image a layer's cells depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import isnan, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convext.inspection.field_place import Fields, Place
from convext.inspection.field_rules import fields
from convext.inspection.step import Step
from convext.inspection.table import Table, pair, sizes
from convext.inspection.tape import Tape, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[int, int]


@dataclass(frozen=True)
class FieldRow:
    """The receptive fields of one layer's output. Pairs are of height (rows) and width (columns).

    Attributes:
        name: of the step on the tape: the layer's, with the operation or a number after it for
            the calls of a layer before its last.
        type: the layer's class; the operation's name where a module with layers inside did it.
        output_shape: (N, C, H, W), or what the layer puts out.
        size: of the largest field, in pixels, those in the padding included. A field is the
            smallest rectangle around all the pixels that a cell depends on, in any channel.
            None where neither arithmetic nor the tape has an answer.
        by: "arithmetic", or "tape" where arithmetic has no answer and size is that of one number,
            the one in the middle, padding left out; "" where there is none.
        jump: pixels from one cell's field to the next one's, the effective stride; 0 where all
            cells read the same, a fraction where a grid was enlarged. None where the output is not
            a grid or arithmetic has no answer, as are all that follow.
        start: centre of the first cell's field, pixel 0 having its centre at 0; negative where
            it lies in the padding. None where that cell reads nothing.
        before: how many pixels the fields reach beyond the image at its top and left.
        after: the same at its bottom and right.
        fields: how many cells the grid has, or 1 along an axis where all read the same.
        cut: how many of those reach beyond the image, so that they see padding.
    """

    name: str
    type: str
    output_shape: tuple[int, ...]
    size: Pair | None
    by: str
    jump: tuple[Fraction, Fraction] | None = None
    start: tuple[Fraction, Fraction] | None = None
    before: Pair | None = None
    after: Pair | None = None
    fields: int | None = None
    cut: int | None = None

    @property
    def cut_share(self) -> float | None:
        """The share of fields that the image's border cuts, from 0 to 1."""
        return None if self.cut is None else self.cut / self.fields


@dataclass(frozen=True)
class FieldCheck:
    """One cell's field by arithmetic, cut at the image's border, and by the tape.

    Attributes:
        layer, cell: a row's name; row and column of one of its cells.
        arithmetic: the pixels' rows and columns.
        tape: rows and columns of the smallest rectangle around the pixels found.
        whole: whether the field lies within the image.
    """

    layer: str
    cell: Pair
    arithmetic: tuple[range, range]
    tape: tuple[range, range]
    whole: bool

    @property
    def agrees(self) -> bool:
        """Equal where the field lies within the image, else no pixel outside of it.

        A field that is cut can have less in it: the last rows of an image, which a stride leaves
        unread, are not made up for by the padding of a later layer.
        """
        if self.whole:
            return self.arithmetic == self.tape
        return all(
            len(found) == 0 or (known.start <= found.start and found.stop <= known.stop)
            for known, found in zip(self.arithmetic, self.tape, strict=True)
        )


@dataclass(frozen=True)
class ReceptiveFields:
    """The layers' fields, in the order in which they ran. `print` shows a table; so does rich."""

    model: str
    input_size: tuple[int, ...]
    rows: tuple[FieldRow, ...]
    tape: Tape = field(repr=False)
    places: tuple[Fields | None, ...] = field(repr=False)

    def row(self, layer: str | nn.Module) -> FieldRow:
        """A layer's row, of its last call.

        Raises:
            ValueError: there is none.
        """
        name = self.tape.find(layer).name
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise ValueError(f"layer must be one of {names}, got {layer!r}")

    def field_of(self, layer: str | nn.Module, *cell: int) -> tuple[range, range]:
        """The rows and columns of the image around the pixels that one cell depends on.

        They are what the tape finds: those that exist, padding left out, both empty where the cell
        depends on none.

        Args:
            layer: a module, or a row's name.
            cell: row and column in a grid (N, C, H, W), all channels of the first image; in
                another output the place of one number, without that of the image.

        Raises:
            ValueError: there is no such layer or cell.
            NotImplementedError: an operation on the way is not known.
        """
        step = self.tape.find(layer)
        mask = cell_mask(step, cell)
        return enclosing(self.tape.precedents(step.index, mask)[0])

    def grid_cell(
        self, layer: str | nn.Module | None = None, cell: Pair | None = None
    ) -> tuple[str, Pair]:
        """The name of a row with a grid, and one of its cells.

        Args:
            layer: the last such row by default.
            cell: row and column; in the middle by default.

        Raises:
            ValueError: the layer has no grid, or there is no such cell.
        """
        grids = [r.name for r in self.rows if r.jump is not None and len(r.output_shape) == 4]
        name = self.row(layer).name if layer is not None else (grids or [""])[-1]
        if name not in grids:
            raise ValueError(f"layer must be one with a grid ({', '.join(grids)}), got {name!r}")
        step = self.tape.find(name)
        if cell is None:
            cell = tuple(size // 2 for size in step.value.shape[2:])
        cell_mask(step, cell)
        return name, tuple(cell)

    def check(self, layer: str | nn.Module | None = None) -> tuple[FieldCheck, ...]:
        """Arithmetic beside the tape: each grid's first, middle and last cell.

        Args:
            layer: only this one; all rows for which arithmetic has an answer by default. The time
                is that of three runs backwards for each.
        """
        checks = []
        for row in self.rows if layer is None else (self.row(layer),):
            if row.jump is None or len(row.output_shape) != 4:
                continue
            height, width = row.output_shape[2:]
            cells = {(0, 0): None, (height // 2, width // 2): None, (height - 1, width - 1): None}
            checks += [self._check(row, cell) for cell in cells]
        return tuple(checks)

    def _check(self, row: FieldRow, cell: Pair) -> FieldCheck:
        places = self.places[self.tape.find(row.name).index].places
        image = self.input_size[2:]
        ends = [
            (place.axis.low(i), place.axis.high(i)) for place, i in zip(places, cell, strict=True)
        ]
        clipped = tuple(
            range(int(max(low, 0)), int(min(high, size - 1)) + 1) if low <= high else range(0)
            for (low, high), size in zip(ends, image, strict=True)
        )
        if any(len(side) == 0 for side in clipped):
            clipped = (range(0), range(0))
        whole = all(low >= 0 and high < size for (low, high), size in zip(ends, image, strict=True))
        return FieldCheck(row.name, cell, clipped, self.field_of(row.name, *cell), whole)

    def plot(self, layer: str | nn.Module | None = None, cell: Pair | None = None) -> Figure:
        """A picture: the image's pixels, and around them the fields on the way to one cell.

        For the layers before it that have a grid, eight of them at most, it shows the field of the
        cell in the middle of those that the cell depends on. What lies beyond the image is padding.

        Args:
            layer: with a grid as output; the last such one by default.
            cell: row and column; in the middle by default.

        Raises:
            ValueError: the layer has no grid, or there is no such cell.
        """
        from convext.inspection.field_plot import plot_fields

        return plot_fields(self, layer, cell)

    def table(self) -> Table:
        """What `print` shows."""
        return Table(
            f"{self.model}, input {sizes(self.input_size)}: receptive fields in pixels, "
            "height x width",
            ("layer", "type", "output shape", "field", "jump", "start", "before", "after", "cut"),
            tuple(_cells(row) for row in self.rows),
            left=3,
        )

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self):
        return self.table()


def receptive_field(model: nn.Module, input_size: Sequence[int]) -> ReceptiveFields:
    """Which pixels each layer's cells depend on: how many, how far apart, where.

    Sizes, jumps and starts are by arithmetic, from kernel sizes, strides, paddings and dilations
    alone (Araujo, Norris, Sim: "Computing Receptive Fields of Convolutional Neural Networks",
    Distill, 2019). They follow the operations of one run on zeros, so that it makes no difference
    how the model is written; branches that meet read what either reads. `check` compares them with
    the pixels that the tape finds. Where arithmetic has no answer, as for attention or branches
    whose jumps differ, a row has what the tape finds for one cell and says so.

    There is a row for each operation that gave a module's output, the model's own included. Pixels
    that a layer's padding reflects or repeats count as padding.

    Args:
        model: any module that takes one image tensor. It is left as it was: same mode, same
            buffers, no gradients.
        input_size: of that tensor, (N, C, H, W).

    Raises:
        ValueError: input_size is not four sizes of at least 1.
        NotImplementedError: the model reads a tensor after overwriting a view of it.
    """
    input_size = tuple(input_size)
    if len(input_size) != 4 or any(size < 1 for size in input_size):
        raise ValueError(
            f"input_size must be four sizes (N, C, H, W) of at least 1, got {input_size}"
        )
    tape = record(model, zeros_for(model, input_size))
    places = tuple(fields(tape))
    indices = sorted({index for calls in tape.outputs.values() for index in calls} - {0})
    rows = tuple(_row(tape, tape.steps[index], places[index]) for index in indices)
    return ReceptiveFields(type(model).__name__, input_size, rows, tape, places)


def zeros_for(model: nn.Module, size: Sequence[int]) -> Tensor:
    """An input of the dtype of the model's first parameter, on its device."""
    example = next(model.parameters(), torch.empty(0))
    return torch.zeros(tuple(size), dtype=example.dtype, device=example.device)


def _row(tape: Tape, step: Step, found: Fields | None) -> FieldRow:
    leaf = step.layer and not list(step.module.children())
    shape = tuple(step.value.shape)
    named = (step.name, type(step.module).__name__ if leaf else step.kind, shape)
    if found is None:
        return FieldRow(*named, *_measured(tape, step))
    jump = found.jump(len(shape))
    if jump is None:
        return FieldRow(*named, found.size, "arithmetic")
    image = tape.steps[0].value.shape[2:]
    covered = [place.axis.covered(place.cells) for place in found.places]
    whole = [_uncut(place, pixels) for place, pixels in zip(found.places, image, strict=True)]
    start = [place.axis.low(0) + place.axis.high(0) for place in found.places]
    return FieldRow(
        *named,
        found.size,
        "arithmetic",
        jump=jump,
        start=None if any(map(isnan, start)) else tuple(Fraction(s) / 2 for s in start),
        before=tuple(int(max(0, -low)) for low, _ in covered),
        after=tuple(
            int(max(0, high - pixels + 1)) for (_, high), pixels in zip(covered, image, strict=True)
        ),
        fields=prod(place.cells for place in found.places),
        cut=prod(place.cells for place in found.places) - prod(whole),
    )


def _uncut(place: Place, pixels: int) -> int:
    """How many cells' fields lie within the image."""
    return sum(place.axis.low(i) >= 0 and place.axis.high(i) < pixels for i in range(place.cells))


def _measured(tape: Tape, step: Step) -> tuple[Pair | None, str]:
    # One number, not all channels of a cell: which dimension holds the channels is not known.
    mask = torch.zeros(step.value.shape, dtype=torch.bool)
    mask[(0, *(size // 2 for size in mask.shape[1:]))] = True
    try:
        found = tape.precedents(step.index, mask)
    except NotImplementedError:
        return None, ""
    return tuple(len(side) for side in enclosing(found[0])), "tape"


def cell_mask(step: Step, cell: Sequence[int]) -> Tensor:
    """Of one cell of the first image; in a grid with all channels."""
    mask = torch.zeros(step.value.shape, dtype=torch.bool)
    part = mask[0].movedim(0, -1) if mask.dim() == 4 else mask[0]
    expected = 2 if mask.dim() == 4 else part.dim()
    limits = part.shape[:expected]
    if len(cell) != expected or not all(0 <= i < n for i, n in zip(cell, limits, strict=True)):
        ranges = " and ".join(f"0 to {n - 1}" for n in limits)
        raise ValueError(f"cell of {step.name} must be {ranges}, got {tuple(cell)}")
    part[tuple(cell)] = True
    return mask


def enclosing(mask: Tensor) -> tuple[range, range]:
    """Rows and columns around the cells of the first image, (N, C, H, W)."""
    grid = mask[0].any(0)
    sides = [grid.any(dim).nonzero() for dim in (1, 0)]
    return tuple(
        range(int(side.min()), int(side.max()) + 1) if len(side) else range(0) for side in sides
    )


def _cells(row: FieldRow) -> tuple[str, ...]:
    if row.size is None:
        size = "unknown"
    else:
        size = sizes(row.size) + (" by tape" if row.by == "tape" else "")
    cells = [row.name, row.type, sizes(row.output_shape), size]
    if row.jump is None:
        return (*cells, *[""] * 5)
    pairs = (row.jump, row.start, row.before, row.after)
    cut = f"{row.cut} of {row.fields}" if row.cut else "none"
    return (*cells, *(pair(p) if p is not None else "" for p in pairs), cut)
