"""Classic kernels as weights for our conv2d, and what they do to a picture and to one pixel of it.

A convolution knows no pictures, only channels: a grey picture is one, a colour picture three (red,
green and blue). Its weight is (out_channels, in_channels / groups, kH, kW), and an output channel
is always a sum over the input channels of its group, each by a kernel of its own. What one kernel
does to a colour picture is therefore a choice of weight, `how`:

    "sum"   groups 1: the same kernel for each channel, and so the sum of what it finds in red, in
            green and in blue; one output channel for each kernel
    "each"  groups C: each channel by itself; C output channels for each kernel, a colour picture
    "grey"  groups 1: the kernel times 0.299 for red, 0.587 for green, 0.114 for blue: as if the
            picture had been made grey first (ITU-R BT.601's luminance), since both are linear

A layer that is trained learns all of its weight, and so another kernel for each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convext.functional import conv2d
from convext.inspection.kernels import (
    FILTERS,
    Filter,
    FilterTable,
    box,
    format_number,
    format_rows,
    gaussian,
)

__all__ = [
    "FILTERS",
    "HOW",
    "LUMINANCE",
    "PADDINGS",
    "Filter",
    "FilterTable",
    "PixelProduct",
    "apply_at",
    "apply_by_loops",
    "apply_filter",
    "as_weight",
    "box",
    "gaussian",
]

Kernel = str | Filter | Tensor

HOW = ("sum", "each", "grey")
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
PADDINGS = ("valid", "zeros", "reflect", "replicate", "circular")


def as_weight(
    kernel: Kernel | Sequence[Kernel],
    in_channels: int = 1,
    how: str = "sum",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Kernels as the weight of a convolution.

    Args:
        kernel: a name in FILTERS, a Filter or a tensor (kH, kW); or several of one size.
        in_channels: C of the images to come.
        how: what becomes of the channels, see the module's text; "each" needs groups=in_channels.
        dtype: of the weight.

    Returns:
        (K, C, kH, kW) for K kernels; (C * K, 1, kH, kW) for "each", the first K for channel 0.

    Raises:
        ValueError: an unknown name or `how`, kernels of several sizes or none, in_channels below
            1, or other than 3 for "grey".
        TypeError: something else than a kernel.
    """
    several = [kernel] if isinstance(kernel, (str, Filter, Tensor)) else list(kernel)
    kernels = [_numbers(one) for one in several]
    sizes = {tuple(one.shape) for one in kernels}
    if len(sizes) != 1:
        raise ValueError(f"kernel must be kernels of one size, got {sorted(sizes) or 'none'}")
    stack = torch.stack(kernels)  # (K, kH, kW)
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if how == "sum":
        weight = stack[:, None].expand(-1, in_channels, -1, -1)
    elif how == "each":
        weight = stack.repeat(in_channels, 1, 1)[:, None]
    elif how == "grey":
        if in_channels != 3:
            raise ValueError(f"how='grey' needs 3 in_channels: red, green, blue; got {in_channels}")
        luminance = torch.tensor(LUMINANCE, dtype=torch.float64)
        weight = stack[:, None] * luminance[:, None, None]
    else:
        raise ValueError(f"how must be one of {', '.join(HOW)}, got {how!r}")
    return weight.to(dtype).contiguous()


def apply_filter(
    image: Tensor, kernel: Kernel | Sequence[Kernel], how: str = "sum", padding: str = "valid"
) -> Tensor:
    """Filters a picture by our conv2d.

    Args:
        image: (H, W), (C, H, W) or (N, C, H, W); whole numbers are taken as float32.
        kernel, how: as for `as_weight`.
        padding: what lies beyond the border. "valid": nothing, and the output is smaller, by
            kH - 1 and kW - 1, but each number of it is of real pixels. The others keep H and W:
            "zeros", which draws an edge around a picture that is not dark there, "reflect",
            "replicate" and "circular", as nn.Conv2d's padding_mode. An even kernel's extra cell
            is at the bottom and the right.

    Returns:
        The channels of `as_weight` in the axis of C; for an image (H, W) and one kernel
        likewise (H, W). Of image's dtype, or float32.

    Raises:
        ValueError: as `as_weight`; an unknown padding; an image with other axes, smaller than the
            kernel, or for "reflect" and "circular" not larger than the padding.
    """
    pixels = _batched(image)
    weight = as_weight(kernel, pixels.shape[1], how, pixels.dtype).to(pixels.device)
    size, image_size = tuple(weight.shape[-2:]), tuple(pixels.shape[-2:])
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if padding == "valid":
        _check_fits(size, image_size)
    else:
        (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in size)
        least = {"reflect": 1, "circular": 0}.get(padding)
        if least is not None and (image_size[0] < bottom + least or image_size[1] < right + least):
            raise ValueError(
                f"padding={padding!r} takes its cells from the image: with a kernel of {size} it "
                f"must be at least {(bottom + least, right + least)}, got {image_size}"
            )
        mode = "constant" if padding == "zeros" else padding
        pixels = F.pad(pixels, (left, right, top, bottom), mode)
    groups = pixels.shape[1] if how == "each" else 1
    output = conv2d(pixels, weight, groups=groups)
    if image.dim() == 4:
        return output
    return output[0, 0] if image.dim() == 2 and output.shape[1] == 1 else output[0]


@dataclass(frozen=True, eq=False)
class PixelProduct:
    """What a convolution does at one pixel: a window times a kernel, cell by cell, and the sum.

    `print` writes it out.

    Attributes:
        row, col: of the window's middle.
        rows, cols: the window, as slices of the image.
        values: the window, (kH, kW), or (C, kH, kW) of an image with channels.
        weights: of the kernel, of the same shape.
        products: values * weights.
        total: their sum, a tensor without axes.
    """

    row: int
    col: int
    rows: slice
    cols: slice
    values: Tensor
    weights: Tensor
    products: Tensor
    total: Tensor

    def __str__(self) -> str:
        window = f"{self.rows.start}:{self.rows.stop}, {self.cols.start}:{self.cols.stop}"
        if self.values.dim() == 3:
            window = f":, {window}"
        lines = [f"(image[{window}] * kernel).sum() = {format_number(float(self.total))}"]
        grids = [
            grid.reshape(-1, *grid.shape[-2:])
            for grid in (self.values, self.weights, self.products)
        ]
        channels = len(grids[0])
        for channel in range(channels):
            lines.append("")
            if channels > 1:
                name = ("red", "green", "blue")[channel] if channels == 3 else f"channel {channel}"
                lines.append(f"{name}: {format_number(float(grids[2][channel].sum()))}")
            columns = [format_rows(grid[channel].tolist()) for grid in grids]
            middle = len(columns[0]) // 2
            for number, (value, weight, product) in enumerate(zip(*columns, strict=True)):
                times, equals = "*=" if number == middle else "  "
                lines.append(f"  {value}  {times}  {weight}  {equals}  {product}")
        return "\n".join(lines)


def apply_at(image: Tensor, row: int, col: int, kernel: Kernel, how: str = "sum") -> PixelProduct:
    """The operation of a convolution at one pixel, without one.

    Args:
        image: (H, W) or (C, H, W); whole numbers are taken as float32.
        row, col: of the pixel under the kernel's middle (under the last cell before the middle,
            where kH or kW is even), in the image.
        kernel: a name in FILTERS, a Filter or a tensor (kH, kW).
        how: "sum" or "grey", see the module's text. One channel by itself is `image[c]`.

    Raises:
        ValueError: the window leaves the image, for which there is no padding here; an unknown
            kernel; a `how` that gives more than one number; an image with other axes.
    """
    if image.dim() not in (2, 3):
        raise ValueError(f"image must be (H, W) or (C, H, W), got {tuple(image.shape)}")
    if how == "each":
        raise ValueError("how must be 'sum' or 'grey', for 'each' gives a number for each channel")
    pixels = _batched(image)[0]
    weights = as_weight(kernel, len(pixels), how, pixels.dtype).to(pixels.device)[0]
    rows, cols = (
        slice(middle - (size - 1) // 2, middle + size // 2 + 1)
        for middle, size in zip((row, col), weights.shape[1:], strict=True)
    )
    height, width = pixels.shape[1:]
    if rows.start < 0 or cols.start < 0 or rows.stop > height or cols.stop > width:
        (first_row, last_row), (first_col, last_col) = (
            ((size - 1) // 2, length - 1 - size // 2)
            for size, length in zip(weights.shape[1:], (height, width), strict=True)
        )
        raise ValueError(
            f"row must be from {first_row} to {last_row} and col from {first_col} to {last_col}, "
            f"where the kernel is inside the image; got {row}, {col}"
        )
    values = pixels[:, rows, cols]
    if image.dim() == 2:
        values, weights = values[0], weights[0]
    products = values * weights
    return PixelProduct(row, col, rows, cols, values, weights, products, products.sum())


def apply_by_loops(image: Tensor, kernel: Kernel, how: str = "sum") -> Tensor:
    """A convolution as the lesson writes it: `apply_at` in a list comprehension, for every pixel.

    Equal to `apply_filter(..., padding="valid")`; to the bit where no sum is rounded, as with
    whole pixels and whole weights. Thousands of times slower: for images of some thousand pixels.

    Args:
        image, kernel, how: as for `apply_at`.

    Returns:
        (H - kH + 1, W - kW + 1).

    Raises:
        ValueError: as `apply_at`; an image smaller than the kernel.
    """
    size, image_size = tuple(as_weight(kernel).shape[-2:]), tuple(image.shape[-2:])
    _check_fits(size, image_size)
    rows, cols = (
        range((k - 1) // 2, length - k // 2) for k, length in zip(size, image_size, strict=True)
    )
    return torch.stack(
        [
            torch.stack([apply_at(image, row, col, kernel, how).total for col in cols])
            for row in rows
        ]
    )


def _check_fits(size: tuple[int, ...], image_size: tuple[int, ...]) -> None:
    if any(length < k for k, length in zip(size, image_size, strict=True)):
        raise ValueError(f"image must be at least as large as the kernel, {size}, got {image_size}")


def _numbers(kernel: Kernel) -> Tensor:
    """A kernel's weights, (kH, kW), float64."""
    if isinstance(kernel, str):
        if kernel not in FILTERS:
            raise ValueError(f"kernel must be one of {', '.join(FILTERS)}, got {kernel!r}")
        kernel = FILTERS[kernel]
    if isinstance(kernel, Filter):
        return torch.tensor(kernel.rows, dtype=torch.float64)
    if not isinstance(kernel, Tensor):
        raise TypeError(f"kernel must be a name, a Filter or a tensor, got {type(kernel).__name__}")
    if kernel.dim() != 2 or not kernel.numel():
        raise ValueError(f"kernel must be (kH, kW), got {tuple(kernel.shape)}")
    return kernel.detach().double().cpu()


def _batched(image: Tensor) -> Tensor:
    """(N, C, H, W), floating point."""
    if image.dim() not in (2, 3, 4) or not image.numel():
        raise ValueError(
            f"image must be (H, W), (C, H, W) or (N, C, H, W), got {tuple(image.shape)}"
        )
    pixels = image if image.is_floating_point() else image.float()
    return pixels.reshape((1,) * (4 - image.dim()) + tuple(image.shape))
