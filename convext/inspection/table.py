"""A table that prints as plain text, and in colour where rich is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text. `str` gives it in plain text; rich's `print` draws it where it has room.

    Attributes:
        title: above it.
        columns: their names.
        rows: of as many cells as there are columns.
        left: how many of the first columns hold words, which stand at the left; numbers stand at
            the right.
        total: a last row, below a rule; none if empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    total: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [self.columns, *self.rows, *([self.total] if self.total else [])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < self.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        rule = "-" * max(len(line) for line in lines)
        if self.total:
            lines.insert(-1, rule)
        return "\n".join([self.title, "", lines[0], rule, *lines[1:]])

    def __rich_console__(self, console, options):
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        text = str(self)
        if max(map(len, text.splitlines())) > options.max_width:
            # Cells broken to a few letters a line would tell nobody anything.
            yield Text(text, no_wrap=True, overflow="ignore")
            return
        table = RichTable(
            title=self.title, box=box.SIMPLE_HEAD, show_footer=bool(self.total), title_style=""
        )
        totals = self.total or ("",) * len(self.columns)
        for column, (name, total) in enumerate(zip(self.columns, totals, strict=True)):
            side = "left" if column < self.left else "right"
            table.add_column(name, total, justify=side, no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        yield table


def sizes(shape: Sequence[int]) -> str:
    """1 x 28 x 28."""
    return " x ".join(str(size) for size in shape)


def pair(numbers: Sequence[float]) -> str:
    """Of height and width: 2 where they are equal, else 2 x 1."""
    texts = [f"{float(number):g}" for number in numbers]
    return texts[0] if texts[0] == texts[1] else " x ".join(texts)
