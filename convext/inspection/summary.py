"""What each layer of a model computes: its output, its parameters, its arithmetic, its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from convext.inspection.field_rules import fields
from convext.inspection.receptive_field import zeros_for
from convext.inspection.table import Table, pair, sizes
from convext.inspection.tape import record

_COUNTS = ("weights", "biases", "parameters", "multiplications")
_COLUMNS = ("layer", "type", "output shape", *_COUNTS, "field")
_WIDE = (
    *("layer", "type", "output shape", *_COUNTS, "multiply-adds"),
    *("parameter bytes", "output bytes", "field", "jump"),
)


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one call of it where a model calls a layer more than once.

    Attributes:
        name: its name in the model, as in `model.named_modules()`.
        type: its class.
        output_shape: of its first output, batch included.
        weights, biases, parameters: how many numbers it learns, parameters being all of them;
            0 for a call that uses parameters already counted.
        multiplications, multiply_adds: see `summary`.
        parameter_bytes: of the memory that holds them, at each parameter's own dtype; 0 as above.
        output_bytes: of the memory of the first output, at its dtype and batch size, whether or
            not the layer writes it in place.
        field: the receptive field's (height, width) in pixels; see `receptive_field`. None where
            arithmetic has no answer, or the input is not (N, C, H, W).
        jump: pixels from one cell's field to the next one's, (vertical, horizontal); None where
            the output is not a grid besides.
    """

    name: str
    type: str
    output_shape: tuple[int, ...]
    weights: int
    biases: int
    parameters: int
    multiplications: int
    multiply_adds: int
    parameter_bytes: int
    output_bytes: int
    field: tuple[int, int] | None = None
    jump: tuple[Fraction, Fraction] | None = None


@dataclass(frozen=True)
class Summary:
    """The rows in the order of their calls. `print` shows a table; so does rich, in colour."""

    model: str
    input_size: tuple[int, ...]
    rows: tuple[LayerRow, ...]

    @property
    def parameters(self) -> int:
        """Numbers learned by all layers together, a shared one counted once."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiplications(self) -> int:
        """Multiplications for one image; see `summary`."""
        return sum(row.multiplications for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image; see `summary`."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """Memory of all parameters, in bytes."""
        return sum(row.parameter_bytes for row in self.rows)

    @property
    def output_bytes(self) -> int:
        """Memory of all outputs together, in bytes: what training keeps, or nearly."""
        return sum(row.output_bytes for row in self.rows)

    @property
    def largest_output_bytes(self) -> int:
        """Memory of the largest output, in bytes."""
        return max((row.output_bytes for row in self.rows), default=0)

    def table(self, wide: bool = False) -> Table:
        """What `print` shows; wide, with multiply-adds, memory and jumps besides."""
        columns = _WIDE if wide else _COLUMNS
        title = f"{self.model}, input {sizes(self.input_size)}, multiplications per image"
        if wide:
            title += f", largest output {self.largest_output_bytes:,} bytes"
        return Table(
            title,
            columns,
            tuple(tuple(_cell(row, column) for column in columns) for row in self.rows),
            left=3,
            total=tuple(self._total(column) for column in columns),
        )

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self):
        return self.table()

    def _total(self, column: str) -> str:
        if column in ("type", "output shape", "field", "jump"):
            return ""
        if column == "layer":
            return "total"
        return f"{sum(getattr(row, _attribute(column)) for row in self.rows):,}"


def _attribute(column: str) -> str:
    return column.replace("-", "_").replace(" ", "_")


def _cell(row: LayerRow, column: str) -> str:
    if column in ("layer", "type"):
        return row.name if column == "layer" else row.type
    value = getattr(row, _attribute(column))
    if column in ("output shape", "field"):
        return sizes(value) if value is not None else ""
    if column == "jump":
        return pair(value) if value is not None else ""
    return f"{value:,}" if value else ""


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Runs the model on zeros and records what each layer does.

    A layer is a module without submodules, or one with parameters of its own.

    Multiplications are counted for one image and the forward pass: one for each use of a
    weight at each output position. For a convolution that is output positions times weights
    (those that meet padding included), for a transposed one input positions times weights, for a
    linear layer its weights at each position, for a normalisation with gamma one for each number
    it puts out. Adding a bias multiplies nothing; layers without weights count as 0, and so does
    a type of layer not named here.

    Multiply-adds (MACs) are those of the multiplications whose products are summed: all of
    convolutions and linear layers, none of normalisations. They are half of what PyTorch's
    `FlopCounterMode` counts for one image, which counts products of two activations besides, as
    in attention. torchinfo's "mult-adds" are those of the batch, count each bias of a
    convolution at each output position, a transposed convolution's weights at output positions,
    and all parameters of other layers once an image, wherever and how often they are used.

    Args:
        model: any module that takes one float tensor. It is left as it was: same mode, same
            buffers, no gradients.
        input_size: of that tensor, (N, C, H, W) or whatever the model takes; the first is N.

    Raises:
        ValueError: an empty input_size, or a size below 1.
    """
    input_size = tuple(input_size)
    if not input_size or any(size < 1 for size in input_size):
        raise ValueError(f"input_size must be sizes of at least 1, got {input_size}")
    rows: list[LayerRow] = []
    calls: list[str] = []  # the name of the module of each row
    seen: set[int] = set()  # parameters already counted, by identity: layers may share them
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for _, p in own)
        biases = sum(p.numel() for n, p in own if "bias" in n)
        parameters = sum(p.numel() for _, p in own)
        out = _first_tensor(output)
        products = _multiplications(module, _first_tensor(inputs), out)
        calls.append(names[module])
        rows.append(
            LayerRow(
                name=names[module] or type(module).__name__,
                type=type(module).__name__,
                output_shape=tuple(out.shape),
                weights=parameters - biases,
                biases=biases,
                parameters=parameters,
                multiplications=products,
                multiply_adds=products if isinstance(module, (_ConvNd, nn.Linear)) else 0,
                parameter_bytes=sum(p.numel() * p.element_size() for _, p in own),
                output_bytes=out.numel() * out.element_size(),
            )
        )

    layers = [
        module
        for module in names
        if not list(module.children()) or list(module.parameters(recurse=False))
    ]
    modes = {module: module.training for module in names}
    zeros = zeros_for(model, input_size)
    hooks = [module.register_forward_hook(note) for module in layers]
    try:
        model.eval()  # so that batch norm's running statistics stay as they are
        with torch.no_grad():
            model(zeros)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if len(input_size) == 4:
        rows = _with_fields(model, zeros, rows, calls)
    return Summary(type(model).__name__, input_size, tuple(rows))


def _with_fields(
    model: nn.Module, zeros: torch.Tensor, rows: Sequence[LayerRow], calls: Sequence[str]
) -> list[LayerRow]:
    """The rows with their receptive fields, as far as arithmetic has an answer.

    Args:
        calls: for each row the name of the module that was called.
    """
    try:
        tape = record(model, zeros)
    except NotImplementedError:  # the model overwrites what it reads, so that there is no tape
        return list(rows)
    found = fields(tape)
    # Calls that do nothing with the input are not on the tape.
    steps = {
        name: iter(steps) for name, steps in tape.outputs.items() if len(steps) == calls.count(name)
    }
    described = []
    for row, name in zip(rows, calls, strict=True):
        index = next(steps[name]) if name in steps else None
        if index is not None and found[index] is not None:
            size, jump = found[index].size, found[index].jump(tape.steps[index].value.dim())
            row = replace(row, field=size, jump=jump)
        described.append(row)
    return described


def _multiplications(module: nn.Module, x: torch.Tensor, out: torch.Tensor) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return 0
    if isinstance(module, _ConvNd):
        # A transposed convolution spreads each input position; the others gather into each
        # output position. Unbatched tensors have no N in front.
        grid = x if isinstance(module, _ConvTransposeNd) else out
        return math.prod(grid.shape[2 - weight.dim() :]) * weight.numel()
    if isinstance(module, nn.Linear):
        return math.prod(out.shape[1:-1]) * weight.numel()
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        return math.prod(out.shape[1:])
    return 0


def _first_tensor(value: object) -> torch.Tensor:
    """The tensor itself, or the first one in a tuple, list or dict (recurrent layers, say)."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)) and value:
        return _first_tensor(value[0])
    return torch.empty(0)
