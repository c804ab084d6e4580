"""The rules of what is done cell by cell, along an axis or to places; see rules.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convext.inspection.spreadsheet.page import Page, planes, write_value
from convext.inspection.spreadsheet.text import (
    area,
    areas,
    call,
    finite,
    name,
    number,
)
from convext.inspection.step import Ref, Step, leaves


def reduction(function: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
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
    return write_value(step, tops, (call(function, row) for row in rows), page)


def softmax(logarithm: bool, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """EXP(x - maximum), divided by the sum of all of them; or the logarithm of that."""
    page.begin(step.name, "x - LN(sum of EXP)" if logarithm else "EXP(x) / sum of EXP")
    axis = step.named_arguments()["dim"]
    source = sources[0]
    rows = source.movedim(axis, -1).reshape(-1, source.shape[axis])
    sums = []
    for row in rows:
        maximum = call("MAX", row)
        parts = [f"SUMPRODUCT(EXP({area(part)}-{maximum}))" for part in areas(row)]
        sums.append((maximum, "+".join(parts)))
    order = torch.arange(len(rows)).reshape(source.movedim(axis, -1).shape[:-1])
    order = order.unsqueeze(-1).expand(source.movedim(axis, -1).shape).movedim(-1, axis)
    pairs = zip(source.reshape(-1).tolist(), order.reshape(-1).tolist(), strict=True)
    write = "{0}-{1}-LN({2})" if logarithm else "EXP({0}-{1})/({2})"
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(source))
    formulas = (write.format(name(cell), *sums[row]) for cell, row in pairs)
    return write_value(step, tops, formulas, page)


def pointwise(write: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Each cell by itself: `write` has its place, and names of the operation's other arguments."""
    settings = step.named_arguments()
    numbers = {n: number(step, v) for n, v in settings.items() if isinstance(v, float | int)}
    page.begin(step.name, write.format("x", **numbers))
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    cells = sources[0].reshape(-1).tolist()
    return write_value(step, tops, (write.format(name(c), **numbers) for c in cells), page)


def arithmetic(sign: str, step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """Two values, cell by cell, or a value and a number, or constants, which get cells."""
    settings = step.named_arguments()
    if settings.get("alpha", 1) != 1 or settings.get("rounding_mode"):
        raise NotImplementedError(f"{step.name}: {step.op} with alpha or rounding has no formula")
    operands = [settings["self"], settings["other"]]
    by_step = dict(zip(dict.fromkeys(step.inputs), sources, strict=True))
    page.begin(step.name, f" {sign} ".join(_label(step, operand) for operand in operands))
    columns = []
    for operand in operands:
        if isinstance(operand, Ref):
            cells = by_step[operand.step].expand(step.value.shape).reshape(-1).tolist()
            columns.append([name(cell) for cell in cells])
        elif isinstance(operand, Tensor) and operand.dim():
            values = planes(finite(step, operand))
            cells = page.numbers(values, page.tops(*values.shape[:2])).reshape(operand.shape)
            cells = cells.expand(step.value.shape).reshape(-1).tolist()
            columns.append([name(cell, fixed=True) for cell in cells])
        else:
            columns.append([number(step, operand)] * step.value.numel())
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0].expand(step.value.shape)))
    formulas = (sign.join(pair) for pair in zip(*columns, strict=True))
    return write_value(step, tops, formulas, page)


def _label(step: Step, operand: Any) -> str:
    if isinstance(operand, Ref):
        return "x"
    is_number = not isinstance(operand, Tensor) or not operand.dim()
    return number(step, operand) if is_number else "constant"


def padding(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A border of cells that hold a number."""
    settings = step.named_arguments()
    border = number(step, settings["value"] or 0)
    page.begin(step.name, f"a border of {border}")
    cells = torch.nn.functional.pad(sources[0], settings["pad"], value=-1.0)
    grids = planes(step.value)
    tops = page.tops(*grids.shape[:2], planes(sources[0]))
    formulas = (border if cell < 0 else name(cell) for cell in cells.reshape(-1).tolist())
    return write_value(step, tops, formulas, page)


def movement(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
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


def same(step: Step, sources: Sequence[Tensor], page: Page) -> Tensor:
    """A copy, or a layer that does nothing in evaluation mode."""
    return sources[0].reshape(step.value.shape)
