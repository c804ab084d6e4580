"""Which cells one activation reads, layer by layer, and which read one cell.

fastai's lesson shows this in a spreadsheet, by its "trace precedents".
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convext.inspection.step import Step
from convext.inspection.tape import Tape, record
from convext.inspection.terms import Terms, linear_part, terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LayerCells:
    """The cells of one step that belong to a trace.

    Attributes:
        step: the index of the step on the tape.
        name: of the step, as a rule its layer's.
        mask: bool, of the shape of the step's value: True at the cells.
        values: the step's whole value, as the model computed it.
        weights: float64, of the same shape. Among precedents: what the traced cell multiplies each
            of these by. Among dependents: what each of these multiplies the traced cell by. 0 at
            the other cells; None where the two are not joined directly, or not by a product.
    """

    step: int
    name: str
    mask: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    weights: Tensor | None = field(repr=False)

    @property
    def cells(self) -> Tensor:
        """Their places, int64 (K, axes), in order."""
        return self.mask.nonzero()


@dataclass(frozen=True, eq=False)
class Trace:
    """What one cell depends on ("precedents"), or what depends on it ("dependents").

    `print` shows the regions and the written-out sum; so does rich, as a table and text.

    Attributes:
        direction: "precedents" or "dependents".
        tape: all steps of the run, with their values.
        step: the index of the traced cell's step.
        index: the cell's place in that step's value, N included.
        layers: the steps that have cells in the trace, in the order in which they ran; the traced
            cell's own is the last of precedents, the first of dependents.
        terms: the traced cell written out; None for dependents and for a cell of the input.
    """

    direction: str
    tape: Tape = field(repr=False)
    step: int
    index: tuple[int, ...]
    layers: tuple[LayerCells, ...]
    terms: Terms | None = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the traced cell's step."""
        return self.tape.steps[self.step].name

    @property
    def value(self) -> float:
        """What the model computed for the traced cell."""
        return float(self.tape.steps[self.step].value[self.index])

    def layer(self, name: str) -> LayerCells:
        """The cells of one step, by its name.

        Raises:
            ValueError: no cell of it is in the trace.
        """
        for cells in self.layers:
            if cells.name == name:
                return cells
        names = ", ".join(cells.name for cells in self.layers)
        raise ValueError(f"name must be one of {names}, got {name!r}")

    def __str__(self) -> str:
        from convext.inspection.written import written_trace

        return written_trace(self)

    def __rich__(self) -> object:
        from convext.inspection.written import rich_trace

        return rich_trace(self)

    def plot(self, channels: int = 4) -> Figure:
        """Draws each step's grids with the cells of the trace framed and the others pale.

        Args:
            channels: how many grids of a step are drawn at most, of those that have cells.

        Raises:
            ValueError: channels below 1.
        """
        from convext.inspection.trace_picture import plot_trace

        return plot_trace(self, channels)


def precedents(
    model: nn.Module, input: Tensor, layer: str | int | nn.Module, index: Sequence[int]
) -> Trace:
    """The cells of every layer that one activation is computed from, exactly.

    A cell counts as read whatever its value: all of a max pool's window, both sides of a ReLU,
    cells whose weight is 0. Padding is no cell of a layer: among the terms it is shown as such.

    Args:
        model: any module; it runs once, in evaluation mode, and is left as it was.
        input: what it takes, as a rule (N, C, H, W).
        layer: whose output has the cell: a name as in `model.named_modules()`, the module, or a
            step's name or index; see `Tape.find`.
        index: the cell's place in that output, N first. Where N is 1, it may be left out.

    Returns:
        The cells with their values; for the last step the weights, products, bias and sum, in
        float64 from the model's own numbers.

    Raises:
        TypeError: a model that is no module, or an input that is no tensor.
        ValueError: no such layer, or no such cell in its output.
        NotImplementedError: an operation on the way of which is not known what it reads.
    """
    _check(model, input)
    tape = record(model, input)
    step = tape.find(layer)
    return precedents_on(tape, step, cell_index(index, step))


def dependents(
    model: nn.Module, input: Tensor, layer: str | int | nn.Module, index: Sequence[int]
) -> Trace:
    """The cells of every later layer that one cell has a part in, exactly.

    Args:
        model, input: see `precedents`.
        layer: "input", or the layer whose output has the cell.
        index: the cell's place in it, N first. Where N is 1, it may be left out.

    Returns:
        The cells with their values; where a convolution or a linear layer reads the cell directly,
        the weight that each of its cells multiplies it by.

    Raises:
        As `precedents`.
    """
    _check(model, input)
    tape = record(model, input)
    step = tape.find(layer)
    return dependents_on(tape, step, cell_index(index, step))


def precedents_on(tape: Tape, step: Step, index: tuple[int, ...]) -> Trace:
    """As `precedents`, on a tape."""
    masks = tape.precedents(step.index, _one_cell(step, index))
    written = None if step.op is None else terms(tape, step, index)
    weights: dict[int, Tensor] = {}
    for read in written.reads if written is not None else ():
        if read.weights is not None:
            weights[read.step] = torch.zeros(masks[read.step].shape, dtype=torch.float64)
            places = tuple(read.cells[read.inside].T)
            weights[read.step][places] = read.weights[read.inside]
    return Trace("precedents", tape, step.index, index, _layers(tape, masks, weights), written)


def dependents_on(tape: Tape, step: Step, index: tuple[int, ...]) -> Trace:
    """As `dependents`, on a tape."""
    masks = tape.dependents(step.index, _one_cell(step, index))
    weights = {
        later.index: _weights_of(tape, later, step, index)
        for later in tape.steps[step.index + 1 :]
        if step.index in later.inputs and linear_part(later) is not None
    }
    return Trace("dependents", tape, step.index, index, _layers(tape, masks, weights), None)


def cell_index(index: Sequence[int], step: Step) -> tuple[int, ...]:
    """A cell's place in a step's value, with N in front where it was left out.

    Raises:
        ValueError: more or fewer numbers than axes, or one beyond its axis.
    """
    shape = tuple(step.value.shape)
    try:
        place = tuple(operator.index(i) for i in index)
    except TypeError as error:
        raise ValueError(f"index must be whole numbers, got {index!r}") from error
    if len(place) == len(shape) - 1 and shape[0] == 1:
        place = (0, *place)
    if len(place) != len(shape) or not all(0 <= i < n for i, n in zip(place, shape, strict=True)):
        ranges = ", ".join(f"0-{n - 1}" for n in shape)
        raise ValueError(
            f"index must be a cell of {step.name}, whose axes are {ranges}, got {tuple(index)}"
        )
    return place


def _check(model: nn.Module, input: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")


def _one_cell(step: Step, index: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(step.value.shape, dtype=torch.bool)
    mask[index] = True
    return mask


def _weights_of(tape: Tape, later: Step, step: Step, index: tuple[int, ...]) -> Tensor:
    """What a linear step multiplies one cell by, in each of its own: its output for a 1 there."""
    sources = [
        _one_cell(step, index).double()
        if source == step.index
        else torch.zeros(tape.steps[source].value.shape, dtype=torch.float64)
        for source in dict.fromkeys(later.inputs)
    ]
    with torch.no_grad():
        return linear_part(later)(*sources)


def _layers(
    tape: Tape, masks: dict[int, Tensor], weights: dict[int, Tensor]
) -> tuple[LayerCells, ...]:
    return tuple(
        LayerCells(i, tape.steps[i].name, mask, tape.steps[i].value, weights.get(i))
        for i, mask in sorted(masks.items())
        if mask.any()
    )
