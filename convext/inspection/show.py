"""What a network has learned: the filters of a layer, and what its layers make of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from convext.inspection import show_plot
from convext.inspection.kinds import CONV_BLOCKS, CONVOLUTIONS
from convext.inspection.tape import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACTIVATIONS = frozenset(
    (
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "elu", "elu_"),
        *("hardtanh", "hardtanh_", "gelu", "gelu_", "silu", "silu_", "mish", "mish_"),
        *("hardswish", "hardswish_", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus"),
    )
)
_MOST_NAMED = 8  # dead channels, in a line of text
_COLUMNS = ("layer", "operation", "output", "mean", "std", "min", "max", "dead")
_TEXTS = (0, 1, 2, 7)  # the columns that are no numbers
_CHANNEL_COLUMNS = ("channel", "mean", "std", "min", "max", "")


@dataclass(frozen=True, eq=False)
class LayerFilters:
    """The kernels of one convolution.

    Attributes:
        layer: its name in the model.
        weight: (out_channels, in_channels / groups, kH, kW), a copy, on the CPU.
        groups: of the convolution.
    """

    layer: str
    weight: Tensor
    groups: int

    @property
    def is_color(self) -> bool:
        """Whether each filter reads three channels, as of a colour picture."""
        return self.groups == 1 and self.weight.shape[1] == 3

    def upsampled(self, factor: int = 8) -> Tensor:
        """The kernels enlarged, bilinearly: (out_channels, in_channels / groups, f kH, f kW).

        Raises:
            ValueError: a factor below 1.
        """
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        return F.interpolate(self.weight.float(), scale_factor=factor, mode="bilinear")

    def plot(self) -> Figure:
        """Draws the kernels on one scale.

        Filters of one input channel as they are and, beside these, upsampled, red above 0 and
        blue below; so too those of three, as colours, where grey is 0. Others are a table, a row
        for each output channel and a column for each channel that it reads.
        """
        return show_plot.filters(self)

    def __str__(self) -> str:
        outputs, *kernel = self.weight.shape
        low, high = float(self.weight.min()), float(self.weight.max())
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return (
            f"{self.layer}: {outputs} filters of {' x '.join(map(str, kernel))}{groups}, weights "
            f"from {low:.3f} to {high:.3f}"
        )


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """What one operation put out.

    `print` shows a line for each channel.

    Attributes:
        name: of the layer, as in `model.named_modules()`, or of the operation on the tape.
        operation: what it was, as "relu".
        values: (N, C, H, W), on the CPU.
    """

    name: str
    operation: str
    values: Tensor

    @property
    def mean(self) -> Tensor:
        """Of each channel, over images and places: (C,), float64."""
        return self.values.double().mean((0, 2, 3))

    @property
    def std(self) -> Tensor:
        """Of each channel, over images and places, divided by their number: (C,), float64."""
        return self.values.double().std((0, 2, 3), correction=0)

    @property
    def dead(self) -> Tensor:
        """The channels of an activation function that are nowhere above 0: (C,), bool.

        On this input, that is: another may wake them. Of other operations none is, for below 0
        they say something, too.
        """
        if self.operation not in ACTIVATIONS:
            return torch.zeros(self.values.shape[1], dtype=torch.bool)
        return ~(self.values > 0).any(0).flatten(1).any(1)

    @property
    def is_convolution(self) -> bool:
        """Whether the operation is one."""
        return self.operation in CONVOLUTIONS + CONV_BLOCKS

    def __str__(self) -> str:
        channels, *size = self.values.shape[1:]
        title = f"{self.name} ({self.operation}): {channels} channels of {_by(size)}"
        flat = self.values.double().transpose(0, 1).flatten(1)
        columns = zip(self.mean, self.std, flat.amin(1), flat.amax(1), self.dead, strict=True)
        rows = [
            (str(number), *map(_number, row[:4]), "dead" if row[4] else "")
            for number, row in enumerate(columns)
        ]
        return f"{title}\n\n{_table(_CHANNEL_COLUMNS, rows, left=(5,))}"


@dataclass(frozen=True, eq=False)
class Activations:
    """What the layers of a model put out for an input, in the order in which they ran.

    `print` shows a line for each layer, and so does rich.

    Attributes:
        model: its class.
        input: (N, C, H, W), on the CPU.
        layers: the layers.
    """

    model: str
    input: Tensor
    layers: tuple[LayerMaps, ...]

    def plot(self, image: int = 0) -> Figure:
        """Draws every channel of every layer for one image, each layer on a scale of its own.

        Layers that put out nothing below 0 are drawn as ink, others red above 0, blue below. Dead
        channels have a red frame. A convolution begins a row.

        Raises:
            ValueError: no such image.
        """
        if not -len(self.input) <= image < len(self.input):
            raise ValueError(f"image must be from 0 to {len(self.input) - 1}, got {image}")
        return show_plot.activations(self, image)

    def __str__(self) -> str:
        return f"{self._title()}\n\n{_table(_COLUMNS, self._cells(), left=_TEXTS)}"

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(
            title=self._title(), box=box.SIMPLE_HEAD, title_style="", padding=(0, 1, 0, 0)
        )
        for number, name in enumerate(_COLUMNS):
            side = "left" if number in _TEXTS else "right"
            table.add_column(name, justify=side, no_wrap=name != "dead")
        for row in self._cells():
            table.add_row(*row)
        return table

    def _title(self) -> str:
        return f"{self.model}, input {_by(self.input.shape)}; dead: activations never above 0 here"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name,
                layer.operation,
                _by(layer.values.shape[1:]),
                _number(layer.values.double().mean()),
                _number(layer.values.double().std(correction=0)),
                _number(layer.values.min()),
                _number(layer.values.max()),
                _named(layer.dead),
            )
            for layer in self.layers
        ]


def show_filters(model: nn.Module, layer: str | None = None) -> LayerFilters:
    """The kernels of one of a model's convolutions.

    Args:
        model: any module with nn.Conv2d layers, stock ones, ours or of fused blocks.
        layer: the name of one, as in `model.named_modules()`; by default the first, whose filters
            read the image itself.

    Raises:
        ValueError: there is no such convolution, or its weight has no size yet.
    """
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ValueError(f"model must have a Conv2d layer, got {type(model).__name__} with none")
    if layer is None:
        layer = next(iter(convolutions))
    if layer not in convolutions:
        raise ValueError(f"layer must be one of {', '.join(convolutions)}, got {layer!r}")
    found = convolutions[layer]
    if is_lazy(found.weight):
        raise ValueError(f"layer {layer!r} is lazy: its weight has no size before the first run")
    weight = found.weight.detach().cpu().clone()
    return LayerFilters(layer or type(found).__name__, weight, found.groups)


def show_activations(
    model: nn.Module, x: Tensor, layers: Sequence[str] | None = None
) -> Activations:
    """Runs a model once and keeps what its layers put out.

    It is run as `convext.inspection.tape.record` does, in evaluation mode, and left as it was.

    Args:
        model: any module that takes one tensor.
        x: images for it, (N, C, H, W), on its device.
        layers: names of layers or of operations on the tape; by default every convolution and
            every activation function that puts out maps.

    Raises:
        ValueError: x has other axes or no image; there is no such layer, or it puts out no
            (N, C, H, W); there is nothing to show.
    """
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x must be images (N, C, H, W), got {tuple(x.shape)}")
    tape = record(model, x)
    if layers is None:
        steps = [
            step
            for step in tape.steps
            if step.kind in ACTIVATIONS.union(CONVOLUTIONS, CONV_BLOCKS) and step.value.dim() == 4
        ]
        if not steps:
            raise ValueError(f"model must have a convolution, got {type(model).__name__} with none")
    else:
        steps = [tape.find(layer) for layer in layers]
        for step in steps:
            if step.value.dim() != 4:
                raise ValueError(
                    f"layer {step.name!r} must put out (N, C, H, W), got {tuple(step.value.shape)}"
                )
    maps = tuple(LayerMaps(s.name, s.kind, s.value.detach().cpu()) for s in steps)
    return Activations(type(model).__name__, x.detach().cpu(), maps)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _number(value: Tensor) -> str:
    return f"{round(float(value), 3) + 0.0:.3f}"  # + 0.0 makes a -0 a 0


def _named(dead: Tensor) -> str:
    """How many channels, and which."""
    numbers = dead.nonzero().flatten().tolist()
    if not numbers:
        return ""
    more = ", ..." if len(numbers) > _MOST_NAMED else ""
    return f"{len(numbers)}: {', '.join(map(str, numbers[:_MOST_NAMED]))}{more}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (names, *rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
