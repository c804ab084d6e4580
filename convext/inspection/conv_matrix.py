"""The matrix that a convolution is: mostly zeros that never change, and few weights, many times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEK = "αβγδεζηθικλμνξοπρστυφχψω"


@dataclass(frozen=True, eq=False)
class ConvMatrix:
    """A convolution as a matrix, for an input of one size. `print` shows it where it is small.

    A row is an output cell and a column an input cell, both in the order of `flatten()`: channel by
    channel, row by row. An entry that is stored is a weight, or a sum of weights where padding
    repeats input cells; what is not stored is zero by construction, whatever the weights become.

    Attributes:
        layer: what the layer prints as.
        input_size, output_size: (C, H, W) of one image before and after.
        weight: the layer's, (out_channels, in_channels / groups, kH, kW), as it was.
        bias: (rows,), that of each output cell's channel; zeros where the layer has none.
        sparse: the matrix, (rows, columns), COO and coalesced: entries lie row by row. Its dtype is
            the layer's, or float32 for 16-bit layers, in which their products are summed.
        weight_index: (entries,) int64, for each of `sparse.values()` the weight that it is, by its
            number in `weight.view(-1)`; weight.numel() + i stands for the sum `sums[i]`. Entries of
            the same number are tied: they are equal, and stay so.
        sums: the weights of each sum of several; empty unless padding repeats cells, by a
            padding_mode other than "zeros".
        uses: int64, like weight: how many times the matrix holds each weight.
    """

    layer: str
    input_size: tuple[int, int, int]
    output_size: tuple[int, int, int]
    weight: Tensor
    bias: Tensor
    sparse: Tensor
    weight_index: Tensor
    sums: tuple[tuple[int, ...], ...]
    uses: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): (out_channels * out_H * out_W, in_channels * H * W)."""
        return tuple(self.sparse.shape)

    @property
    def entries(self) -> int:
        """How many entries weights determine."""
        return len(self.weight_index)

    @property
    def zeros(self) -> int:
        """How many entries are zero by construction."""
        return math.prod(self.shape) - self.entries

    @property
    def T(self) -> Tensor:  # noqa: N802 (as Tensor.T)
        """The transpose, sparse: it takes a gradient of the output to that of the input."""
        return self.sparse.t()

    def dense(self) -> Tensor:
        """The matrix with all its zeros: rows * columns numbers."""
        return self.sparse.to_dense()

    def ties(self) -> Tensor:
        """(rows, columns) int64: `weight_index` in its place, -1 where zero by construction."""
        found = torch.full(self.shape, -1, device=self.weight_index.device)
        found[tuple(self.sparse.indices())] = self.weight_index
        return found

    def __matmul__(self, x: Tensor) -> Tensor:
        """The matrix times a flattened input (columns,), or several as columns (columns, N).

        No bias is added: `matrix @ x.flatten() + matrix.bias` is the layer's output, flattened.

        Raises:
            ValueError: another shape.
        """
        if x.dim() not in (1, 2) or len(x) != self.shape[1]:
            raise ValueError(
                f"x must be ({self.shape[1]},) or ({self.shape[1]}, N), got {tuple(x.shape)}; "
                "apply(x) takes images"
            )
        return (self.sparse @ x.to(self.sparse.dtype)).to(x.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """What the layer makes of x, by one matrix product and the bias.

        Args:
            x: one flattened image (columns,), an image (C, H, W) or a batch (N, C, H, W); of the
                layer's dtype.

        Returns:
            The output of the same form and dtype.

        Raises:
            TypeError: another dtype.
            ValueError: another shape.
        """
        flat = self._flat(x, self.input_size, "x")
        out = self.sparse @ flat + self.bias[:, None]
        return self._unflat(out, self.output_size, x)

    def backward_input(self, grad_output: Tensor) -> Tensor:
        """The gradient of the input, given that of the output: the transpose times it.

        Args:
            grad_output: (rows,), (out_channels, out_H, out_W) or (N, out_channels, out_H, out_W),
                of the layer's dtype.

        Returns:
            The gradient of the same form and dtype: (columns,), (C, H, W) or (N, C, H, W).

        Raises:
            TypeError: another dtype.
            ValueError: another shape.
        """
        flat = self._flat(grad_output, self.output_size, "grad_output")
        return self._unflat(self.sparse.mH @ flat, self.input_size, grad_output)

    def _flat(self, x: Tensor, size: tuple[int, ...], name: str) -> Tensor:
        """Images as the columns of a matrix."""
        sizes = ((math.prod(size),), size, (*x.shape[:1], *size))
        if tuple(x.shape) not in sizes:
            image = ", ".join(map(str, size))
            raise ValueError(
                f"{name} must be ({math.prod(size)},), ({image}) or (N, {image}), "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != self.weight.dtype:
            raise TypeError(f"{name} must be {self.weight.dtype} as the layer is, got {x.dtype}")
        return x.reshape(-1, math.prod(size)).T.to(self.sparse.dtype)

    def _unflat(self, flat: Tensor, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Its converse, in the form and dtype of `like`."""
        shape = (-1,) if like.dim() == 1 else (*like.shape[:-3], *size)
        return flat.T.reshape(shape).to(like.dtype)

    def name_of(self, index: int) -> str:
        """How text and pictures call a number of `weight_index`.

        A weight is a Greek letter where there are up to 24 of them, else its number; a sum is
        written out.
        """
        if index >= self.weight.numel():
            return "+".join(self.name_of(i) for i in self.sums[index - self.weight.numel()])
        return GREEK[index] if self.weight.numel() <= len(GREEK) else str(index)

    def __str__(self) -> str:
        from convext.inspection.conv_matrix_text import lines

        return "\n".join("".join(part for part, _ in line) for line in lines(self))

    def __rich__(self):
        from rich.text import Text

        from convext.inspection.conv_matrix_text import lines

        return Text("\n").join(Text.assemble(*line) for line in lines(self))

    def plot(self) -> Figure:
        """A picture: each weight in its colour, in the matrix and in the kernels beside it.

        Zeros by construction are white. Cells are labelled where there is room.

        Raises:
            ValueError: more than 2000 rows or columns.
        """
        from convext.inspection.conv_matrix_plot import plot

        return plot(self)


def conv_matrix(layer: nn.Conv2d, input_size: Sequence[int]) -> ConvMatrix:
    """The matrix that a convolution multiplies flattened images by.

    A convolution is a dense layer with two bonds: most of its weights are zero and can't be
    trained, and those that can are the same few in every row. See M. Kleinsmith, "CNNs from
    different viewpoints" (2017), which fastai's book shows in chapter 13, and V. Dumoulin and
    F. Visin, "A guide to convolution arithmetic for deep learning" (2016), section 4.1. The
    transpose of the matrix is the backward pass, hence "transposed convolution".

    All of a layer's settings count: stride, padding, dilation, groups, padding_mode. Where padding
    repeats input cells ("reflect", "replicate", "circular"), an entry is the sum of the weights
    that meet the same cell.

    Args:
        layer: a torch.nn.Conv2d, stock or ours; it is read, and never run on numbers.
        input_size: of one image, (C, H, W) or (1, C, H, W).

    Returns:
        The matrix, on the layer's device. It is a copy: it does not follow the layer's training.
        It takes memory for out_channels * out_H * out_W * in_channels / groups * kH * kW entries.

    Raises:
        TypeError: layer is something else.
        ValueError: an input_size that the layer does not take.
    """
    input_size = _image_size(input_size)
    size = output_size(layer, input_size)
    row, column, index = _products(layer, input_size, size)

    # One entry for each pair of row and column, in their order; more than one product in an
    # entry only where padding repeats cells.
    columns = math.prod(input_size)
    place, order = torch.sort(row * columns + column, stable=True)
    index = index[order]
    place, entry, terms = torch.unique_consecutive(place, return_inverse=True, return_counts=True)

    weight = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    values = torch.zeros(len(place), dtype=dtype, device=weight.device)
    values.index_add_(0, entry, weight.view(-1)[index].to(dtype))
    rows = math.prod(size)
    sparse = torch.sparse_coo_tensor(
        torch.stack([place // columns, place % columns]),
        values,
        (rows, columns),
        is_coalesced=True,
        check_invariants=True,
    )
    bias = torch.zeros(size[0], dtype=dtype, device=weight.device)
    if layer.bias is not None:
        bias += layer.bias.detach()
    weight_index, sums = _ties(index, entry, terms, weight.numel())
    return ConvMatrix(
        layer=str(layer),
        input_size=input_size,
        output_size=size,
        weight=weight,
        bias=bias.repeat_interleave(math.prod(size[1:])),
        sparse=sparse,
        weight_index=weight_index,
        sums=sums,
        uses=torch.bincount(index, minlength=weight.numel()).view(weight.shape),
    )


def output_size(layer: nn.Conv2d, input_size: Sequence[int]) -> tuple[int, int, int]:
    """(out_channels, out_H, out_W) that a layer gives for one image (C, H, W); computes no numbers.

    Raises:
        TypeError: layer is not a Conv2d, or one that has not seen its first input.
        ValueError: the layer does not take such an input.
    """
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"layer must be a torch.nn.Conv2d, got {type(layer).__name__}")
    if is_lazy(layer.weight):
        raise TypeError(f"layer must know its in_channels, got {layer} before its first input")
    if min(layer._reversed_padding_repeated_twice) < 0:  # which only some ways of running refuse
        raise ValueError(f"layer must have padding of at least 0, got {layer}")
    bias = None if layer.bias is None else layer.bias.detach().to("meta")
    weight = layer.weight.detach().to("meta")
    image = torch.empty((1, *input_size), dtype=weight.dtype, device="meta")
    try:
        return tuple(layer._conv_forward(image, weight, bias).shape[1:])
    except RuntimeError as error:
        raise ValueError(
            f"input_size must be one that {layer} takes, got {tuple(input_size)}: {error}"
        ) from error


def _image_size(input_size: Sequence[int]) -> tuple[int, int, int]:
    size = tuple(input_size)
    image = size[1:] if len(size) == 4 and size[0] == 1 else size
    if len(image) != 3 or min(image) < 1:
        raise ValueError(
            f"input_size must be (C, H, W) or (1, C, H, W) of at least 1 each, got {size}"
        )
    return image


def _products(
    layer: nn.Conv2d, input_size: tuple[int, int, int], output_size: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """All products of a weight and an input cell: numbers of output cell, input cell and weight.

    Three int64 tensors of the same length. Products with zeros of the padding are left out.
    """
    device = layer.weight.device
    out_channels, out_height, out_width = output_size
    (stride_y, stride_x), (step_y, step_x) = layer.stride, layer.dilation
    kernel_height, kernel_width = layer.kernel_size

    def count(n: int) -> Tensor:
        return torch.arange(n, device=device)

    # The input's cells, numbered, and padded as the layer pads its input: -1 for zeros.
    # (torch reflects floating-point numbers only; float64 holds whole ones up to 2^53.)
    cells = torch.arange(math.prod(input_size), dtype=torch.float64, device=device)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    fill = {"value": -1} if mode == "constant" else {}
    padding = layer._reversed_padding_repeated_twice
    padded = F.pad(cells.view(input_size), padding, mode, **fill).long()

    # Output cell (y, x) and kernel cell (ky, kx) meet at padded cell
    # (stride * y + dilation * ky, stride * x + dilation * kx).
    y = stride_y * count(out_height)[:, None] + step_y * count(kernel_height)
    x = stride_x * count(out_width)[:, None] + step_x * count(kernel_width)
    met = padded[:, y[:, None, :, None], x[None, :, None, :]]  # C, out_H, out_W, kH, kW

    # Each filter reads the channels of its own group.
    channels_per_group = input_size[0] // layer.groups
    group = count(out_channels) // (out_channels // layer.groups)
    channels = group[:, None] * channels_per_group + count(channels_per_group)
    column = met[channels]  # out_channels, C / groups, out_H, out_W, kH, kW

    row = count(math.prod(output_size)).view(out_channels, 1, out_height, out_width, 1, 1)
    weight = count(layer.weight.numel()).view(
        out_channels, channels_per_group, 1, 1, kernel_height, kernel_width
    )
    inside = column >= 0
    return row.expand_as(column)[inside], column[inside], weight.expand_as(column)[inside]


def _ties(
    index: Tensor, entry: Tensor, terms: Tensor, weights: int
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """`weight_index` and `sums` of the matrix.

    Args:
        index: (products,) each product's weight, those of an entry next to each other, ascending.
        entry: (products,) the entry that each is part of.
        terms: (entries,) how many products each has.
        weights: how many weights there are.
    """
    first = torch.cumsum(terms, 0) - terms
    weight_index = index[first]
    several = terms > 1
    if not several.any():
        return weight_index, ()
    # The weights of each sum in a row of a table, -1 after them; equal rows are tied.
    table = torch.full((len(terms), int(terms.max())), -1, device=index.device)
    table[entry, torch.arange(len(index), device=index.device) - first[entry]] = index
    kinds, kind = torch.unique(table[several], dim=0, return_inverse=True)
    weight_index[several] = weights + kind
    sums = tuple(tuple(i for i in kind if i >= 0) for kind in kinds.tolist())
    return weight_index, sums
