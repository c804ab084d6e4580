"""What each layer of a model computes: its output's shape, its parameters, its multiplications."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_COLUMNS = ("layer", "type", "output shape", "weights", "biases", "parameters", "multiplications")


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one call of it where a model calls a layer more than once.

    Attributes:
        name: its name in the model, as in `model.named_modules()`.
        type: its class.
        output_shape: of its first output, batch included.
        weights, biases, parameters: how many numbers it learns, parameters being all of them;
            0 for a call that uses parameters already counted.
        multiplications: see `summary`.
    """

    name: str
    type: str
    output_shape: tuple[int, ...]
    weights: int
    biases: int
    parameters: int
    multiplications: int


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

    def __str__(self) -> str:
        cells = [_COLUMNS, *self._cells(), self._total()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([self._title(), "", lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(title=self._title(), box=box.SIMPLE_HEAD, show_footer=True, title_style="")
        for column, (name, total) in enumerate(zip(_COLUMNS, self._total(), strict=True)):
            side = "left" if column < 3 else "right"
            table.add_column(name, total, justify=side, no_wrap=column > 2)
        for row in self._cells():
            table.add_row(*row)
        return table

    def _title(self) -> str:
        return f"{self.model}, input {_shape(self.input_size)}, multiplications per image"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                row.type,
                _shape(row.output_shape),
                *(
                    f"{count:,}" if count else ""
                    for count in (row.weights, row.biases, row.parameters, row.multiplications)
                ),
            )
            for row in self.rows
        ]

    def _total(self) -> tuple[str, ...]:
        weights = sum(row.weights for row in self.rows)
        biases = sum(row.biases for row in self.rows)
        totals = (weights, biases, self.parameters, self.multiplications)
        return ("total", "", "", *(f"{count:,}" for count in totals))


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Runs the model once on zeros and records what each layer does.

    A layer is a module without submodules, or one with parameters of its own.

    Multiplications are counted for one image and the forward pass: one for each use of a
    weight at each output position. For a convolution that is output positions times weights
    (those that meet padding included), for a linear layer its weights at each position, for a
    normalisation with gamma one for each number it puts out. Adding a bias multiplies nothing;
    layers without weights count as 0, and so does a type of layer not named here.

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
    seen: set[int] = set()  # parameters already counted, by identity: layers may share them
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, inputs: tuple, output: object) -> None:
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for _, p in own)
        biases = sum(p.numel() for n, p in own if "bias" in n)
        parameters = sum(p.numel() for _, p in own)
        out = _first_tensor(output)
        rows.append(
            LayerRow(
                name=names[module] or type(module).__name__,
                type=type(module).__name__,
                output_shape=tuple(out.shape),
                weights=parameters - biases,
                biases=biases,
                parameters=parameters,
                multiplications=_multiplications(module, _first_tensor(inputs), out),
            )
        )

    layers = [
        module
        for module in names
        if not list(module.children()) or list(module.parameters(recurse=False))
    ]
    modes = {module: module.training for module in names}
    example = next(model.parameters(), torch.empty(0))
    hooks = [module.register_forward_hook(record) for module in layers]
    try:
        model.eval()  # so that batch norm's running statistics stay as they are
        with torch.no_grad():
            model(torch.zeros(input_size, dtype=example.dtype, device=example.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return Summary(type(model).__name__, input_size, tuple(rows))


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


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
