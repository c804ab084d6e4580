"""A sheet being filled from left to right: where numbers and formulas stand, and how they look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import ceil

import torch
from openpyxl.formatting.rule import ColorScaleRule, FormulaRule
from openpyxl.styles import Alignment, Border, Font, NamedStyle, Side
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor

from convext.inspection.spreadsheet.text import COLUMNS, ROWS, area, name, rectangle, row_and_column
from convext.inspection.step import Step

LENGTH = 8192  # of a formula
TOP = 6  # the first row of numbers: above are a note, name, operation, headings, a title
WIDTH, HEIGHT = 4.1, 25  # of a cell, in characters of 11 points and in points: a square
FONT = "Arial"

_LIGHT = Font(color="FFFFFFFF")
_TITLE = Font(name=FONT, size=8, color="FF7F7F7F")
_HEADING = Font(name=FONT, size=7, color="FF7F7F7F")
_NAME = Font(name=FONT, size=12, bold=True)
_TEXT = Font(name=FONT, size=9)
_CENTER = Alignment(horizontal="center", vertical="center")
_LINE = Side(style="hair", color="FFBFBFBF")
_NUMBER = "number"  # the style of a grid's cells


def _number_style() -> NamedStyle:
    """A new one, since a workbook takes possession of its styles."""
    return NamedStyle(
        _NUMBER,
        font=Font(name=FONT, size=7),
        alignment=_CENTER,
        border=Border(left=_LINE, right=_LINE, top=_LINE, bottom=_LINE),
        number_format="0.00",
    )


def planes(value: Tensor) -> Tensor:
    """A value as the page shows it: grids below each other, (count, height, width).

    A vector, and grids of one cell each, are one grid of a single column: numbers that follow each
    other.
    """
    *_, height, width = (1, 1, *value.shape)
    if height * width == 1 or (value.dim() < 3 and height == 1):
        return value.reshape(1, -1, 1)
    return value.reshape(-1, height, width)


class Page:
    """The sheet that holds a network; a layer's kernels, then its grids, right of the last layer's.

    Attributes:
        column: the next that is free.
        formulas: how many there are.
        operation: of the layer begun last, in words.
    """

    def __init__(self, sheet: Worksheet) -> None:
        self.sheet = sheet
        self.column = 2
        self.formulas = 0
        self.operation = ""
        sheet.parent.add_named_style(_number_style())
        sheet.sheet_format.defaultColWidth = WIDTH
        sheet.sheet_format.baseColWidth = 4
        sheet.sheet_format.defaultRowHeight = HEIGHT
        sheet.sheet_format.customHeight = True
        sheet.freeze_panes = sheet.cell(TOP - 1, 1)
        sheet.sheet_view.zoomScale = 85
        sheet.sheet_view.showGridLines = False

    def text(self, row: int, column: int, text: str, font: Font = _TITLE) -> None:
        self.sheet.cell(row, column, text).font = font

    def note(self, text: str) -> None:
        self.text(1, 2, text, _TEXT)

    def begin(self, layer: str, operation: str) -> None:
        """Starts a layer's columns, with a head that stays when one scrolls down."""
        self.operation = operation
        self.text(2, self.column, layer, _NAME)
        self.text(3, self.column, operation, _TEXT)
        self._least = self.column + ceil(max(len(layer) * 1.4, len(operation)) / 5)

    def end(self) -> None:
        """Leaves room for the head's text, and a gap."""
        self.column = max(self.column, self._least) + 1

    def tops(self, count: int, height: int, beside: Tensor | None = None) -> list[int]:
        """The first rows of grids below each other.

        Args:
            count: of the grids.
            height: of what stands there, in rows.
            beside: places of grids that these shall stand beside, where there are as many and
                they leave room.
        """
        pitch = height + 2
        if beside is not None and len(beside) == count:
            rows = [row_and_column(cell)[0] for cell in beside[:, 0, 0].tolist()]
            if all(below - row >= pitch for row, below in pairwise(rows)):
                return rows
        return [TOP + number * pitch for number in range(count)]

    def numbers(self, values: Tensor, tops: Sequence[int], title: str = "") -> Tensor:
        """Writes grids of numbers below each other: what one may change.

        Args:
            values: (count, height, width).
            tops: the first row of each.
            title: of each; its number follows.

        Returns:
            Their places, in the same shape.
        """
        return self._grids(values.shape, tops, title, values.double().reshape(-1).tolist())

    def grids(self, shape: Sequence[int], tops: Sequence[int], formulas: Iterable[str]) -> Tensor:
        """As `numbers`, each cell with a formula. A grid of one column has numbers beside it.

        Raises:
            ValueError: a formula is longer than a spreadsheet takes.
        """
        count, height, width = shape
        if width == 1 and count == 1:
            for row in range(height):
                self.text(tops[0] + row, self.column, str(row))
                self.sheet.cell(tops[0] + row, self.column).alignment = _CENTER
            self.column += 1
            self.text(tops[0] - 1, self.column, "output")
            return self._grids(shape, tops, "", self._counted(formulas))
        return self._grids(shape, tops, "channel", self._counted(formulas))

    def _counted(self, formulas: Iterable[str]) -> Iterator[str]:
        for formula in formulas:
            if len(formula) >= LENGTH:
                raise ValueError(
                    f"model: a formula of {len(formula):,} characters is more than a spreadsheet "
                    f"takes, {LENGTH:,}; a cell of this layer reads too many"
                )
            self.formulas += 1
            yield "=" + formula

    def _grids(self, shape, tops, title: str, contents: Iterable) -> Tensor:
        _, height, width = shape
        contents = iter(contents)
        self._check(max(tops) + height, self.column + width)
        cells = [rectangle(top, self.column, height, width) for top in tops]
        for number, top in enumerate(tops):
            if title:
                self.text(top - 1, self.column, f"{title} {number}")
            for row in range(top, top + height):
                for column in range(self.column, self.column + width):
                    self.sheet.cell(row, column, next(contents)).style = _NUMBER
        self.column += width + 1
        return torch.stack(cells)

    def _check(self, row: int, column: int) -> None:
        if row > ROWS or column > COLUMNS:
            raise ValueError(
                f"model: its cells reach row {row:,} and column {column:,} of the sheet, which has "
                f"{ROWS:,} and {COLUMNS:,}"
            )

    def heading(self, text: str) -> None:
        """Of the next column, in a row that stays when one scrolls down."""
        self.text(4, self.column, text, _HEADING)

    def color(self, cells: Tensor, values: Tensor, signed: bool) -> None:
        """Shades cells by their value.

        Args:
            cells: places of grids, (count, height, width), below each other.
            values: what they hold now.
            signed: red above zero, white at it, blue below; else white to black.
        """
        ranges = " ".join(area(grid) for grid in cells)
        rules = self.sheet.conditional_formatting
        if signed:
            limit = float(values.abs().max()) or 1.0
            scale = {"start_value": -limit, "mid_value": 0, "end_value": limit}
            colors = {"start_color": "2166AC", "mid_color": "FFFFFF", "end_color": "B2182B"}
            types = {"start_type": "num", "mid_type": "num", "end_type": "num"}
            rules.add(ranges, ColorScaleRule(**types, **scale, **colors))
            dark = f"ABS({name(float(cells[0, 0, 0]))})>{limit * 0.6!r}"
        else:
            colors = {"start_color": "FFFFFF", "end_color": "000000"}
            rules.add(ranges, ColorScaleRule(start_type="min", end_type="max", **colors))
            whole = area(torch.stack([cells[0, 0, :1], cells[-1, -1, -1:]]), fixed=True)
            dark = f"{name(float(cells[0, 0, 0]))}>(MAX({whole})+MIN({whole}))/2"
        rules.add(ranges, FormulaRule(formula=[dark], font=_LIGHT))


def write_value(step: Step, tops: Sequence[int], formulas: Iterator[str], page: Page) -> Tensor:
    """Ends a layer's columns: writes the formulas of its value, in order, and shades them."""
    grids = planes(step.value)
    cells = page.grids(grids.shape, tops, formulas)
    page.color(cells, grids, signed=bool((grids < 0).any()))
    page.end()
    return cells.reshape(step.value.shape)
