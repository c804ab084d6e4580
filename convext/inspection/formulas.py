"""The formulas of a spreadsheet for each operation that a model applies.

A rule takes a step of a tape, the places of its inputs' cells (convext/inspection/sheet.py) and the
page, writes the step's weights and formulas there, and returns the places of its value's cells, in
the value's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from convext.inspection.sheet import ARGUMENTS, Page, area, areas, name, planes
from convext.inspection.step import Ref, Step, leaves

Rule = Callable[[Step, Sequence[Tensor], Page], Tensor]


def rule(step: Step) -> Rule:
    """How one step is written.

    Raises:
        NotImplementedError: an operation that is not known here.
    """
    kind = step.kind if step.kind in RULES else step.kind.removesuffix("_")  # in place or not
    if kind not in RULES:
        raise NotImplementedError(f"{step.name}: no formula is known for {step.op}")
    return RULES[kind]


def input_cells(step: Step, page: Page) -> Tensor:
    """The input, which is numbers."""
    page.begin("input", " x ".join(map(str, step.value.shape)))
    grids = planes(step.value)
    cells = page.numbers(grids, page.tops(len(grids), grids.shape[1]), "channel")
    page.color(cells, grids, signed=False)
    page.end()
    return cells.reshape(step.value.shape)


def _convolution(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Per input channel the sum of products of a window and a kernel; all added, and the bias.

    Where a window reaches over the border, the part of the kernel that lies on the image counts.
    """
    settings = step.named_arguments()
    weight = _finite(step, settings["weight"])
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
    windows = [
        [_taps(*axis, length, place) for place in range(count)]
        for axis, length, count in zip(axes, source.shape[-2:], step.value.shape[-2:], strict=True)
    ]

    def formulas() -> Iterator[str]:
        for out in range(out_channels):
            first = out // (out_channels // settings["groups"]) * in_channels
            for (rows, kernel_rows), (columns, kernel_columns) in product(*windows):
                terms = [
                    _sum_of_products(
                        source[first + channel, rows, columns],
                        kernels[channel][out, kernel_rows, kernel_columns],
                    )
                    for channel in range(in_channels)
                ]
                yield "+".join(filter(None, [*terms, bias and bias[out]])) or "0"

    return _formulas(step, tops, formulas(), page)


def _taps(
    kernel: int, stride: int, padding: int, dilation: int, length: int, out: int
) -> tuple[slice, slice]:
    """Along one axis, the cells of the image and of the kernel that one output cell joins."""
    first = out * stride - padding
    inside = [k for k in range(kernel) if 0 <= first + k * dilation < length]
    if not inside:
        return slice(0, 0), slice(0, 0)
    ends = first + inside[0] * dilation, first + inside[-1] * dilation + 1
    return slice(*ends, dilation), slice(inside[0], inside[-1] + 1)


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


def _sum_of_products(cells: Tensor, weights: Tensor) -> str:
    """Two equal grids of cells, multiplied and added up; "" if there are none."""
    if not cells.numel():
        return ""
    found = areas(cells)
    if cells.numel() > 1 and [a.shape for a in found] == [cells.shape]:
        return f"SUMPRODUCT({area(cells)},{area(weights, fixed=True)})"
    pairs = zip(cells.reshape(-1).tolist(), weights.reshape(-1).tolist(), strict=True)
    return "+".join(f"{name(cell)}*{name(weight, fixed=True)}" for cell, weight in pairs)


def _product(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A dense layer: the weights of an output lie as the cells that they are for."""
    arguments = step.named_arguments()
    matrix = arguments["mat2"]
    rows = 1 if step.value.dim() < 2 else step.value.shape[0]
    if not isinstance(matrix, Tensor) or (
        isinstance(arguments.get("self"), Ref) and "mat1" in (arguments)
    ):
        raise NotImplementedError(f"{step.name}: {step.op} of two activations has no formula here")
    if rows != 1 or arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        raise NotImplementedError(
            f"{step.name}: formulas are known for {step.op} of one row and without factors, "
            f"got {rows} rows"
        )
    weight = _finite(step, matrix).t()
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
    bias = (
        _parameter(step, "bias", arguments.get("self"), planes(step.value), tops, page)
        if ("mat1" in arguments)
        else None
    )
    formulas = (
        "+".join([*map(_sum_of_products, found, weights[out]), *([bias[out]] if bias else [])])
        for out in range(len(weight))
    )
    return _formulas(step, tops, formulas, page)


def _batch_norm(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """With the running statistics: (x - mean) / SQRT(var + eps) * gamma + beta."""
    settings = step.named_arguments()
    if settings.get("training", False):
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
    channels = len(names["mean"])

    def formula(position: int, cell: float) -> str:
        channel = position // (step.value.numel() // channels)
        mean, var, gamma, beta = (cells[n] and cells[n][channel] for n in names)
        text = f"({name(cell)}-{mean})/SQRT({var}+{eps})"
        return text + (f"*{gamma}" if gamma else "") + (f"+{beta}" if beta else "")

    places = enumerate(sources[0].reshape(-1).tolist())
    return _formulas(step, tops, (formula(*p) for p in places), page)


def _parameter(
    step: Step, title: str, values: Tensor | None, grids: Tensor, tops: Sequence[int], page: Page
) -> list[str] | None:
    """Writes one number per channel in a column, beside its channel, and returns their names."""
    if values is None:
        return None
    page.heading(title)
    values = _finite(step, values).reshape(-1)
    column = len(grids) != len(values)  # the channels are a vector's numbers
    shape = (1, -1, 1) if column else (-1, 1, 1)
    cells = page.numbers(values.reshape(shape), tops)
    page.column -= 1
    return [name(cell, fixed=True) for cell in cells.reshape(-1).tolist()]


def _pool(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """The maximum or mean of a window, without what lies beyond the border."""
    settings = step.named_arguments()
    kernel = _pair(settings["kernel_size"])
    stride = _pair(settings["stride"] or kernel)
    padding, dilation = _pair(settings["padding"]), _pair(settings.get("dilation", 1))
    axes = list(zip(kernel, stride, padding, dilation, strict=True))
    page.begin(step.name, f"{function}: {_sizes(axes)}")
    *_, height, width = sources[0].shape
    windows = [
        [_taps(*axis, length, place)[0] for place in range(count)]
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
                    yield _call(function, window)
                else:
                    yield f"{_call('SUM', window)}/{divisor}"

    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    return _formulas(step, tops, formulas(), page)


def _adaptive_pool(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """The maximum or mean of windows that cover the image, as many as asked for."""
    page.begin(step.name, f"{function} of a window")
    *_, height, width = sources[0].shape
    windows = [
        [slice(o * size // count, -(-(o + 1) * size // count)) for o in range(count)]
        for size, count in zip((height, width), step.value.shape[-2:], strict=True)
    ]
    formulas = (
        _call(function, grid[rows, columns])
        for grid in sources[0].reshape(-1, height, width)
        for rows, columns in product(*windows)
    )
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    return _formulas(step, tops, formulas, page)


def _reduction(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A mean, sum or maximum over some axes, or over all of them."""
    page.begin(step.name, function)
    source = sources[0]
    axes = step.named_arguments().get("dim")
    axes = [axes] if isinstance(axes, int) else axes or range(source.dim())
    over = {axis % source.dim() for axis in axes}
    kept = [axis for axis in range(source.dim()) if axis not in over]
    rows = source.permute(*kept, *sorted(over)).reshape(step.value.numel(), -1)
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(source))
    return _formulas(step, tops, (_call(function, row) for row in rows), page)


def _softmax(logarithm: bool, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """EXP(x - maximum), divided by the sum of all of them; or the logarithm of that."""
    page.begin(step.name, "x - LN(sum of EXP)" if logarithm else "EXP(x) / sum of EXP")
    axis = step.named_arguments()["dim"]
    source = sources[0]
    rows = source.movedim(axis, -1).reshape(-1, source.shape[axis])
    sums = []
    for row in rows:
        maximum = _call("MAX", row)
        parts = [f"SUMPRODUCT(EXP({area(part)}-{maximum}))" for part in areas(row)]
        sums.append((maximum, "+".join(parts)))
    order = torch.arange(len(rows)).reshape(source.movedim(axis, -1).shape[:-1])
    order = order.unsqueeze(-1).expand(source.movedim(axis, -1).shape).movedim(-1, axis)
    pairs = zip(source.reshape(-1).tolist(), order.reshape(-1).tolist(), strict=True)
    write = "{0}-{1}-LN({2})" if logarithm else "EXP({0}-{1})/({2})"
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(source))
    formulas = (write.format(name(cell), *sums[row]) for cell, row in pairs)
    return _formulas(step, tops, formulas, page)


def _pointwise(write: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Each cell by itself: `write` has its place, and names of the operation's other arguments."""
    settings = step.named_arguments()
    numbers = {
        k: f"({v})" if v < 0 else v for k, v in settings.items() if isinstance(v, float | int)
    }
    page.begin(step.name, write.format("x", **numbers))
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    cells = sources[0].reshape(-1).tolist()
    return _formulas(step, tops, (write.format(name(c), **numbers) for c in cells), page)


def _arithmetic(sign: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Two values, cell by cell, or a value and a number, or constants, which get cells."""
    settings = step.named_arguments()
    if settings.get("alpha", 1) != 1 or settings.get("rounding_mode"):
        raise NotImplementedError(f"{step.name}: {step.op} with alpha or rounding has no formula")
    operands = [settings["self"], settings["other"]]
    by_step = dict(zip(dict.fromkeys(step.inputs), sources, strict=True))
    words = [by_step and _label(operand) for operand in operands]
    page.begin(step.name, f" {sign} ".join(words))
    columns = []
    for operand in operands:
        if isinstance(operand, Ref):
            cells = by_step[operand.step].expand(step.value.shape).reshape(-1).tolist()
            columns.append([name(cell) for cell in cells])
        elif isinstance(operand, Tensor) and operand.dim():
            values = planes(_finite(step, operand))
            cells = page.numbers(values, page.tops(*values.shape[:2])).reshape(operand.shape)
            cells = cells.expand(step.value.shape).reshape(-1).tolist()
            columns.append([name(cell, fixed=True) for cell in cells])
        else:
            columns.append([f"({float(operand)!r})"] * step.value.numel())
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0].expand(step.value.shape)))
    formulas = (sign.join(pair) for pair in zip(*columns, strict=True))
    return _formulas(step, tops, formulas, page)


def _label(operand: Any) -> str:
    if isinstance(operand, Ref):
        return "x"
    return "constant" if isinstance(operand, Tensor) and operand.dim() else f"{float(operand):g}"


def _padding(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A border of cells that hold a number."""
    settings = step.named_arguments()
    page.begin(step.name, f"a border of {settings['value'] or 0}")
    cells = torch.nn.functional.pad(sources[0], settings["pad"], value=-1.0)
    border = repr(float(settings["value"] or 0))
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    formulas = (border if cell < 0 else name(cell) for cell in cells.reshape(-1).tolist())
    return _formulas(step, tops, formulas, page)


def _movement(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """What moves values only has no cells of its own."""
    if leaves((step.arguments, step.options), Tensor):
        raise NotImplementedError(f"{step.name}: {step.op} with constants has no formula here")
    by_step = dict(zip(dict.fromkeys(step.inputs), sources, strict=True))

    def filled(tree: Any) -> Any:
        if isinstance(tree, tuple | list):
            return type(tree)(map(filled, tree))
        return by_step[tree.step] if isinstance(tree, Ref) else tree

    output = step.op(*filled(step.arguments), **step.options)
    return output[step.part] if isinstance(output, tuple | list) else output


def _same(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A copy, or a layer that does nothing in evaluation mode."""
    return sources[0].reshape(step.value.shape)


def _formulas(step: Step, tops: Sequence[int], formulas: Iterator[str], page: Page) -> Tensor:
    grids = planes(step.value)
    cells = page.grids(grids.shape, tops, formulas)
    page.color(cells, grids, signed=bool((grids < 0).any()))
    page.end()
    return cells.reshape(step.value.shape)


def _call(function: str, cells: Tensor) -> str:
    """A function of many cells; where they are too many areas, of itself."""
    texts = [area(part) for part in areas(cells)]
    while len(texts) > ARGUMENTS and function != "AVERAGE":
        cuts = range(0, len(texts), ARGUMENTS)
        texts = [f"{function}({','.join(texts[cut : cut + ARGUMENTS])})" for cut in cuts]
    return f"{function}({','.join(texts)})"


def _finite(step: Step, values: Tensor) -> Tensor:
    """As float64 on the CPU.

    Raises:
        ValueError: a value that a spreadsheet's cell cannot hold.
    """
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError(f"{step.name}: its weights hold NaN or infinity, which no cell can")
    return values


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


_MOVEMENTS = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t"),
    *("squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "cat", "stack", "split"),
    *("split_with_sizes", "unbind", "chunk", "repeat", "flip", "roll", "reflection_pad2d"),
    *("replication_pad2d", "upsample_nearest2d", "pixel_shuffle", "pixel_unshuffle", "alias"),
)
_COPIES = ("clone", "_to_copy", "contiguous", "detach", "dropout", "lift_fresh")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv2d", "convolution"), _convolution),
    **dict.fromkeys(("addmm", "mm"), _product),
    **dict.fromkeys(
        (
            *("batch_norm_eval", "native_batch_norm", "cudnn_batch_norm"),
            *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        ),
        _batch_norm,
    ),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), partial(_pool, "MAX")),
    "avg_pool2d": partial(_pool, "AVERAGE"),
    "_adaptive_avg_pool2d": partial(_adaptive_pool, "AVERAGE"),
    "adaptive_max_pool2d": partial(_adaptive_pool, "MAX"),
    "mean": partial(_reduction, "AVERAGE"),
    "sum": partial(_reduction, "SUM"),
    "amax": partial(_reduction, "MAX"),
    "_softmax": partial(_softmax, False),
    "_log_softmax": partial(_softmax, True),
    "relu": partial(_pointwise, "MAX(0,{0})"),
    "hardtanh": partial(_pointwise, "MIN({max_val},MAX({min_val},{0}))"),
    "leaky_relu": partial(_pointwise, "IF({0}>0,{0},{0}*{negative_slope})"),
    "sigmoid": partial(_pointwise, "1/(1+EXP(-{0}))"),
    "tanh": partial(_pointwise, "TANH({0})"),
    "exp": partial(_pointwise, "EXP({0})"),
    "add": partial(_arithmetic, "+"),
    "sub": partial(_arithmetic, "-"),
    "mul": partial(_arithmetic, "*"),
    "div": partial(_arithmetic, "/"),
    "constant_pad_nd": _padding,
    **dict.fromkeys(_MOVEMENTS, _movement),
    **dict.fromkeys(_COPIES, _same),
}
