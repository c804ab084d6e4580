"""Cells as formulas write them.

Cells are tensors of numbers: `place(row, column)`, one float64 per cell, in the shape of the value
that the cells hold. What only moves values about (a view, a transposition, a slice) is done to the
places, and its cells are those that it moved.
"""

from __future__ import annotations

from typing import Any

import torch
from openpyxl.utils import get_column_letter
from torch import Tensor

from convext.inspection.step import Step

COLUMNS, ROWS = 2**14, 2**20  # that Excel has; LibreOffice has as many
ARGUMENTS = 255  # of a function


def place(row: int, column: int) -> float:
    """One number for a cell; the cell to the right has the next one."""
    return float(row * COLUMNS + column)


def rectangle(top: int, left: int, height: int, width: int) -> Tensor:
    """The places of a rectangle of cells: (height, width), float64."""
    rows = torch.arange(top, top + height, dtype=torch.float64)[:, None]
    return rows * COLUMNS + torch.arange(left, left + width, dtype=torch.float64)


def row_and_column(cell: float) -> tuple[int, int]:
    return divmod(int(cell), COLUMNS)


def name(cell: float, fixed: bool = False) -> str:
    """The cell as a formula writes it, "B7"; fixed, "$B$7", it stays when the formula is copied."""
    row, column = row_and_column(cell)
    letter = get_column_letter(column)
    return f"${letter}${row}" if fixed else f"{letter}{row}"


def area(cells: Tensor, fixed: bool = False) -> str:
    """A rectangle of cells as a formula writes it: "B7:D9", or "B7" for one."""
    first, last = (name(float(cells[corner]), fixed) for corner in ((0, 0), (-1, -1)))
    return first if first == last else f"{first}:{last}"


def areas(cells: Tensor) -> list[Tensor]:
    """Cuts a sequence of cells into the rectangles that lie on the page row by row.

    Returns:
        Their places, each (height, width); one after the other they are the sequence.
    """
    runs: list[list[float]] = []
    for cell in cells.reshape(-1).tolist():
        if runs and cell == runs[-1][-1] + 1:
            runs[-1].append(cell)
        else:
            runs.append([cell])
    found: list[list[list[float]]] = []
    for run in runs:
        above = found[-1][-1] if found else []
        if len(above) == len(run) and run[0] == above[0] + COLUMNS:
            found[-1].append(run)
        else:
            found.append([run])
    return [torch.tensor(rows, dtype=torch.float64) for rows in found]


def call(function: str, cells: Tensor) -> str:
    """A function of many cells; where they are too many areas, of itself."""
    texts = [area(part) for part in areas(cells)]
    if len(texts) > ARGUMENTS and function == "AVERAGE":
        return f"{call('SUM', cells)}/{cells.numel()}"
    while len(texts) > ARGUMENTS:
        cuts = range(0, len(texts), ARGUMENTS)
        texts = [f"{function}({','.join(texts[cut : cut + ARGUMENTS])})" for cut in cuts]
    return f"{function}({','.join(texts)})"


def sum_of_products(cells: Tensor, weights: Tensor) -> str:
    """Two equal grids of cells, multiplied and added up; "" if there are none."""
    if not cells.numel():
        return ""
    found = areas(cells)
    if cells.numel() > 1 and [a.shape for a in found] == [cells.shape]:
        return f"SUMPRODUCT({area(cells)},{area(weights, fixed=True)})"
    pairs = zip(cells.reshape(-1).tolist(), weights.reshape(-1).tolist(), strict=True)
    return "+".join(f"{name(cell)}*{name(weight, fixed=True)}" for cell, weight in pairs)


def number(step: Step, value: Any) -> str:
    """As a formula takes it; negative ones in parentheses."""
    value = float(finite(step, torch.as_tensor(value, dtype=torch.float64)))
    text = repr(value).removesuffix(".0").upper()
    return f"({text})" if value < 0 else text


def finite(step: Step, values: Tensor) -> Tensor:
    """As float64 on the CPU.

    Raises:
        ValueError: a value that a spreadsheet's cell cannot hold.
    """
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError(
            f"{step.name}: it has a NaN or infinity, which no spreadsheet's cell holds"
        )
    return values
