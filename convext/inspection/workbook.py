"""A spreadsheet that computes a network: every cell of every layer is a live formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openpyxl import Workbook
from openpyxl.styles import Font
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor, nn

from convext.inspection.formulas import input_cells, rule
from convext.inspection.sheet import Page, name
from convext.inspection.step import Step, leaves
from convext.inspection.tape import Tape, record
from convext.mnist.run_folder import replacing

MAX_CELLS = 500_000
NOTE = (
    "Each cell right of the input is a formula over cells of this sheet. Select one, then "
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
            `convext.inspection.sheet.place`.
    """

    workbook: Workbook
    tape: Tape
    cells: tuple[Tensor, ...]


def write_workbook(model: nn.Module, input: Tensor, path: str | Path) -> Path:
    """Writes a model's run on one image as a spreadsheet, in which each layer is formulas.

    One sheet holds it all, since a spreadsheet draws the arrows of "Trace Precedents" within a
    sheet only: the input, and then for each operation its weights and, right of them, its output,
    channels below each other. An output cell of a convolution is `=SUMPRODUCT(window, kernel)` per
    input channel, added up; the part of a window that lies in the padding is left out. What only
    reshapes has no cells of its own. A second sheet lists the layers, with links. Weights and input
    are written in full precision (16 digits), and the spreadsheet computes in float64.

    The lesson's spreadsheet network gives 4,958 formulas and the lesson's CNN 9,306, about as many
    kilobytes as hundreds of formulas, which LibreOffice computes in seconds.

    Args:
        model: any module made of 2d convolutions, batch norms, pools, activations, dense layers,
            softmax, sums and reshaping; `convext.inspection.formulas.RULES` lists the operations.
        input: one image, (1, C, H, W) or (C, H, W), or one vector, (1, F).
        path: of the file, *.xlsx. One that is there is replaced, when the new one is complete.

    Returns:
        The path.

    Raises:
        NotImplementedError: an operation without a formula, which is named; nothing is written.
        ValueError: more than one image, more cells than 500,000 or than a sheet's columns and rows
            hold, a number that is not finite, or a path that is not *.xlsx.
    """
    path = Path(path)
    if path.suffix != ".xlsx":
        raise ValueError(f"path must end in .xlsx, got {str(path)!r}")
    workbook = lay_out(model, input).workbook
    with replacing(path) as temporary:
        workbook.save(temporary)
    return path


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
        rows.append((step, page.formulas - before))
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
    sheet.append(["input", "", _shape(tape.steps[0]), 0, name(float(cells[0].flatten()[0])), ""])
    for step, count in rows:
        first = name(float(cells[step.index].flatten()[0]))
        formula = f" {page.sheet[first].value}" if count else " the same cells as before it"
        sheet.append([step.name, step.kind, _shape(step), count, first, formula[1:]])
        sheet.cell(sheet.max_row, 6).data_type = "s"  # shown, not computed
    for row in range(2, sheet.max_row + 1):
        link = sheet.cell(row, 1)
        link.hyperlink = f"#{page.sheet.title}!{sheet.cell(row, 5).value}"
        link.style = "Hyperlink"
    sheet.append(["", "", "all", page.formulas])
    for cell in sheet[1]:
        cell.font = Font(bold=True)
    for column, width in zip("ABCDEF", (16, 24, 18, 10, 12, 100), strict=True):
        sheet.column_dimensions[column].width = width
    sheet.freeze_panes = "A2"


def _shape(step: Step) -> str:
    return " x ".join(map(str, step.value.shape))
