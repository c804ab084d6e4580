"""The workbook of `convext.inspection.write_workbook`, in memory."""

from __future__ import annotations

from dataclasses import dataclass

from openpyxl import Workbook
from openpyxl.styles import Alignment, Font
from openpyxl.worksheet.hyperlink import Hyperlink
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor, nn

from convext.inspection.spreadsheet.page import FONT, Page
from convext.inspection.spreadsheet.rules import input_cells, rule
from convext.inspection.spreadsheet.text import name
from convext.inspection.step import Step, leaves
from convext.inspection.tape import Tape, record

MAX_CELLS = 500_000
NOTE = (
    "Each number that a layer computes is a formula over cells of this sheet. Select one, then "
    "Formulas > Trace Precedents (Excel) or Tools > Detective > Trace Precedents (LibreOffice): "
    "arrows come from the cells that it reads. Change a pixel or a weight, and all follows."
)


@dataclass(frozen=True)
class Layout:
    """A workbook in memory, and where each step of the model's run has its cells.

    Attributes:
        workbook: to be saved.
        tape: the model's run.
        cells: by step, the places of its value's cells, in the value's shape; see
            `convext.inspection.spreadsheet.text.place`.
    """

    workbook: Workbook
    tape: Tape
    cells: tuple[Tensor, ...]


def lay_out(model: nn.Module, input: Tensor) -> Layout:
    """The workbook of `write_workbook`, unwritten; same arguments and errors."""
    if input.dim() not in (2, 3, 4) or (input.dim() != 3 and input.shape[0] != 1):
        raise ValueError(
            "input must be one image (1, C, H, W) or (C, H, W), or one vector (1, F), "
            f"got {tuple(input.shape)}"
        )
    if not input.numel() or not input.isfinite().all():
        raise ValueError("input must hold numbers that are finite, and at least one")
    tape = record(model, input)
    rules = [rule(step) for step in tape.steps[1:]]
    count = sum(_size(step) for step in tape.steps)
    if count > MAX_CELLS:
        raise ValueError(
            f"model: its workbook would have {count:,} cells, at most {MAX_CELLS:,} are written; "
            "take a smaller image or fewer channels"
        )
    workbook = Workbook()
    page = Page(workbook.active)
    page.sheet.title = "network"
    page.note(NOTE)
    rows = []
    cells = [input_cells(tape.steps[0], page)]
    for step, write in zip(tape.steps[1:], rules, strict=True):
        before = page.formulas
        cells.append(write(step, [cells[i] for i in dict.fromkeys(step.inputs)], page))
        count = page.formulas - before
        rows.append((step, count, page.operation if count else f"{step.kind}: moves cells only"))
    _contents(workbook.create_sheet("contents"), tape, cells, rows, page)
    workbook.calculation.fullCalcOnLoad = True  # the file holds formulas and no results
    return Layout(workbook, tape, tuple(cells))


def _size(step: Step) -> int:
    """Cells of a step: its value, and the tensors that it takes besides."""
    weights = leaves((step.arguments, step.options), Tensor)
    return step.value.numel() + sum(weight.numel() for weight in weights)


def _contents(sheet: Worksheet, tape: Tape, cells: list[Tensor], rows: list, page: Page) -> None:
    """A list of the layers; its links go to the first cell of each."""
    sheet.append(["layer", "operation", "output", "formulas", "first cell", "its formula"])
    for step, count, operation in [(tape.steps[0], 0, "numbers"), *rows]:
        first = name(float(cells[step.index].flatten()[0]))
        formula = page.sheet[first].value if count else None
        sheet.append([step.name, operation, _shape(step), count, first, formula])
        sheet.cell(sheet.max_row, 6).data_type = "s"  # shown, not computed
    for row in range(2, sheet.max_row + 1):
        link = sheet.cell(row, 1)
        there = f"{page.sheet.title}!{sheet.cell(row, 5).value}"
        link.hyperlink = Hyperlink(ref=link.coordinate, location=there)
        link.font = Font(name=FONT, size=11, color="FF0563C1", underline="single")
    sheet.append(["", "", "all", page.formulas])
    for cell in sheet[1]:
        cell.font = Font(name=FONT, size=11, bold=True)
    for (cell,) in sheet["E1:E" + str(sheet.max_row)]:
        cell.alignment = Alignment(horizontal="center")
    for column, width in zip("ABCDEF", (16, 44, 18, 10, 12, 100), strict=True):
        sheet.column_dimensions[column].width = width
    sheet.freeze_panes = "A2"


def _shape(step: Step) -> str:
    return " x ".join(map(str, step.value.shape))
