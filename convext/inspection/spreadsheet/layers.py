"""The rules of layers with windows or weights; see rules.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from convext.inspection.kinds import takes_batch_statistics
from convext.inspection.spreadsheet.page import Page, planes, write_value
from convext.inspection.spreadsheet.text import (
    areas,
    call,
    finite,
    name,
    sum_of_products,
)
from convext.inspection.step import Ref, Step


def convolution(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Per input channel the sum of products of a window and a kernel; all added, and the bias.

    Where a window reaches over the border, the part of the kernel that lies on the image counts.
    """
    settings = step.named_arguments()
    weight = finite(step, settings["weight"])
    if weight.dim() != 4 or settings.get("transposed", False):
        raise NotImplementedError(
            f"{step.name}: formulas are known for convolutions of images, not for {step.op} "
            f"with a weight of {weight.dim()} axes"
            + (", transposed" if settings.get("transposed", False) else "")
        )
    out_channels, in_channels, *size = weight.shape
    axes = list(zip(size, *(settings[n] for n in ("stride", "padding", "dilation")), strict=True))
    page.begin(step.name, "sum of products: " + _sizes(axes))
    source = sources[0].reshape(-1, *sources[0].shape[-2:])
    grids = planes(step.value)
    tall = len(grids) == out_channels
    height = max(size[0], grids.shape[1] if tall else 0)
    tops = page.tops(out_channels, height, source)
    kernels = []
    for channel in range(in_channels):
        page.heading(f"channel {channel}")
        title = "kernel" if channel == 0 else ""
        kernels.append(page.numbers(weight[:, channel], tops, title))
    page.color(torch.stack([kernels[0][:, 0], kernels[-1][:, -1]], 1), weight, signed=True)
    if not tall:
        tops = page.tops(1, out_channels)
    bias = _parameter(step, "bias", settings["bias"], grids, tops, page)
    page.column += bias is not None  # a gap before the grids
    windows = [
        [taps(*axis, length, out) for out in range(count)]
        for axis, length, count in zip(axes, source.shape[-2:], step.value.shape[-2:], strict=True)
    ]

    def formulas() -> Iterator[str]:
        for out in range(out_channels):
            first = out // (out_channels // settings["groups"]) * in_channels
            for (rows, kernel_rows), (columns, kernel_columns) in product(*windows):
                terms = [
                    sum_of_products(
                        source[first + channel, rows, columns],
                        kernels[channel][out, kernel_rows, kernel_columns],
                    )
                    for channel in range(in_channels)
                ]
                yield "+".join(filter(None, [*terms, bias and bias[out]])) or "0"

    return write_value(step, tops, formulas(), page)


def _sizes(axes: list) -> str:
    """Height and width of a kernel, and what else is not as usual."""
    words = ["x".join(str(size) for size, *_ in axes)]
    for position, (setting, usual) in enumerate(
        [("stride", 1), ("padding", 0), ("dilation", 1)], start=1
    ):
        both = [axis[position] for axis in axes]
        if both != [usual, usual]:
            words.append(f"{setting} {both[0] if both[0] == both[1] else both}")
    return ", ".join(words)


def dense(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A dense layer: the weights of an output lie as the cells that they are for."""
    arguments = step.named_arguments()
    addend, first = (
        (arguments["self"], arguments["mat1"]) if "mat1" in arguments else (None, arguments["self"])
    )
    matrix, rows = arguments["mat2"], step.value.shape[0]
    if not isinstance(first, Ref) or isinstance(matrix, Ref) or isinstance(addend, Ref):
        raise NotImplementedError(
            f"{step.name}: formulas are known for {step.op} of a layer's value and a matrix of "
            "weights, not of two layers' values or in another order"
        )
    if rows != 1 or arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        raise NotImplementedError(
            f"{step.name}: formulas are known for {step.op} of one row and without factors, "
            f"got {rows} rows"
        )
    weight = finite(step, matrix).t()
    page.begin(step.name, "sum of products with all cells")
    found = areas(sources[0])
    columns = all(part.shape[1] == 1 for part in found)
    starts = torch.tensor([0, *(part.numel() for part in found)]).cumsum(0).tolist()
    if columns:  # a matrix, with a column for each output
        page.heading("weights, a column for each output")
        whole = page.numbers(weight.t()[None], page.tops(1, weight.shape[1]))
        weights = [
            [whole[0, a:b, out : out + 1] for a, b in pairwise(starts)]
            for out in range(len(weight))
        ]
        page.color(whole, weight, signed=True)
    else:
        tops = page.tops(len(weight), max(len(part) for part in found))
        banks = []
        for number, (part, (a, b)) in enumerate(zip(found, pairwise(starts), strict=True)):
            page.heading(f"channel {number}")
            title = "weights of" if number == 0 else ""
            values = weight[:, a:b].reshape(-1, *part.shape)
            banks.append(page.numbers(values, tops, title))
            page.color(banks[-1], weight, signed=True)
        weights = [[bank[out] for bank in banks] for out in range(len(weight))]
    tops = page.tops(1, len(weight))
    bias = _parameter(step, "bias", addend, planes(step.value), tops, page)
    formulas = (
        "+".join([*map(sum_of_products, found, weights[out]), *(bias or [])[out : out + 1]])
        for out in range(len(weight))
    )
    return write_value(step, tops, formulas, page)


def batch_norm(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """With the running statistics: (x - mean) / SQRT(var + eps) * gamma + beta."""
    settings = step.named_arguments()
    if takes_batch_statistics(step):
        raise NotImplementedError(
            f"{step.name}: a batch norm without running statistics has no formula here"
        )
    page.begin(step.name, "(x - mean) / SQRT(var + eps) * gamma + beta")
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    names = {
        "mean": settings.get("mean", settings.get("running_mean")),
        "var": settings.get("var", settings.get("running_var")),
        "gamma": settings["weight"],
        "beta": settings["bias"],
    }
    cells = {n: _parameter(step, n, value, grids, tops, page) for n, value in names.items()}
    page.heading("eps")
    eps = torch.tensor(settings.get("eps", settings.get("epsilon")), dtype=torch.float64)
    eps = name(float(page.numbers(eps.reshape(1, 1, 1), tops[:1])), fixed=True)
    page.sheet[eps.replace("$", "")].number_format = "0E+00"
    channels = len(names["mean"])

    def formula(position: int, cell: float) -> str:
        channel = position // (step.value.numel() // channels)
        mean, var, gamma, beta = (cells[n] and cells[n][channel] for n in names)
        text = f"({name(cell)}-{mean})/SQRT({var}+{eps})"
        return text + (f"*{gamma}" if gamma else "") + (f"+{beta}" if beta else "")

    places = enumerate(sources[0].reshape(-1).tolist())
    return write_value(step, tops, (formula(*p) for p in places), page)


def _parameter(
    step: Step, title: str, values: Tensor | None, grids: Tensor, tops: Sequence[int], page: Page
) -> list[str] | None:
    """Writes one number per channel in a column, beside its channel, and returns their names."""
    if values is None:
        return None
    page.heading(title)
    values = finite(step, values).reshape(-1)
    column = len(grids) != len(values)  # the channels are a vector's numbers
    shape = (1, -1, 1) if column else (-1, 1, 1)
    cells = page.numbers(values.reshape(shape), tops)
    page.column -= 1
    return [name(cell, fixed=True) for cell in cells.reshape(-1).tolist()]


def pool(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """The maximum or mean of a window, without what lies beyond the border."""
    settings = step.named_arguments()
    kernel = pair(settings["kernel_size"])
    stride = pair(settings["stride"] or kernel)
    padding, dilation = pair(settings["padding"]), pair(settings.get("dilation", 1))
    axes = list(zip(kernel, stride, padding, dilation, strict=True))
    page.begin(step.name, f"{function}: {_sizes(axes)}")
    *_, height, width = sources[0].shape
    windows = [
        [taps(*axis, length, out)[0] for out in range(count)]
        for axis, length, count in zip(axes, (height, width), step.value.shape[-2:], strict=True)
    ]
    divisors = [None] * prod(step.value.shape[-2:])
    if function == "AVERAGE" and (settings["count_include_pad"] or settings["divisor_override"]):
        counts = [
            [min(o * s - p + k, length + p) - (o * s - p) for o in range(count)]
            for (k, s, p, _), length, count in zip(
                axes, (height, width), step.value.shape[-2:], strict=True
            )
        ]
        divisors = [settings["divisor_override"] or h * w for h, w in product(*counts)]

    def formulas() -> Iterator[str]:
        for grid in sources[0].reshape(-1, height, width):
            for (rows, columns), divisor in zip(product(*windows), divisors, strict=True):
                window = grid[rows, columns]
                if divisor in (None, window.numel()):
                    yield call(function, window)
                else:
                    yield f"{call('SUM', window)}/{divisor}"

    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    return write_value(step, tops, formulas(), page)


def adaptive_pool(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """The maximum or mean of windows that cover the image, as many as asked for."""
    page.begin(step.name, f"{function} of a window")
    *_, height, width = sources[0].shape
    windows = [
        [slice(o * size // count, -(-(o + 1) * size // count)) for o in range(count)]
        for size, count in zip((height, width), step.value.shape[-2:], strict=True)
    ]
    formulas = (
        call(function, grid[rows, columns])
        for grid in sources[0].reshape(-1, height, width)
        for rows, columns in product(*windows)
    )
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    return write_value(step, tops, formulas, page)


def taps(
    kernel: int, stride: int, padding: int, dilation: int, length: int, out: int
) -> tuple[slice, slice]:
    """Along one axis, the cells of the image and of the kernel that one output cell joins."""
    first = out * stride - padding
    inside = [k for k in range(kernel) if 0 <= first + k * dilation < length]
    if not inside:
        return slice(0, 0), slice(0, 0)
    ends = first + inside[0] * dilation, first + inside[-1] * dilation + 1
    return slice(*ends, dilation), slice(inside[0], inside[-1] + 1)


def pair(value: Any) -> tuple[int, int]:
    """Height and width, of one number for both or of a list."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])
