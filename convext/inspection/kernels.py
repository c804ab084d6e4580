"""The classic kernels, as numbers: what each shows, and where it is from.

They are written for cross-correlation, which is what a convolutional layer computes: the kernel is
laid on the image as it stands, and not turned by 180 degrees first, as a convolution in the sense
of signal processing would.

Sources are Prewitt, Object Enhancement and Extraction (1970); Sobel and Feldman's talk of 1968, in
Duda and Hart, Pattern Classification and Scene Analysis (1973); Gonzalez and Woods, Digital Image
Processing (4th edition), by section; and the 13th lesson of fastai's book.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

Rows = tuple[tuple[float, ...], ...]

_SMOOTHING = "Gonzalez and Woods, 3.5"
_SHARPENING = "Gonzalez and Woods, 3.6"


@dataclass(frozen=True)
class Filter:
    """A kernel with a name.

    Attributes:
        name: in FILTERS.
        rows: its weights, from top to bottom.
        meaning: what its output shows, in a line.
        source: where it is from.
    """

    name: str
    rows: Rows
    meaning: str
    source: str

    @property
    def kernel(self) -> Tensor:
        """The weights: (kH, kW), float32, a tensor of the caller's own."""
        return torch.tensor(self.rows, dtype=torch.float32)

    def __str__(self) -> str:
        return "\n".join(format_rows(self.rows))


class FilterTable(Mapping[str, Filter]):
    """Filters by name, in their order; `print` shows a table, and so does rich."""

    def __init__(self, *filters: Filter) -> None:
        self._filters = {found.name: found for found in filters}

    def __getitem__(self, name: str) -> Filter:
        return self._filters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._filters)

    def __len__(self) -> int:
        return len(self._filters)

    def __str__(self) -> str:
        names = max(map(len, self), default=0)
        weights = max((len(row) for f in self.values() for row in format_rows(f.rows)), default=0)
        blocks = []
        for found in self.values():
            columns = ([found.name], format_rows(found.rows), [found.meaning, found.source])
            blocks.append(
                "\n".join(
                    f"{name:{names}}  {row:{weights}}  {note}".rstrip()
                    for name, row, note in zip_longest(*columns, fillvalue="")
                )
            )
        return "\n\n".join(blocks)

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_lines=False, padding=(0, 0, 1, 0))
        table.add_column("kernel", no_wrap=True)
        table.add_column("weights", no_wrap=True)
        table.add_column("what it shows, and source")
        for found in self.values():
            table.add_row(found.name, str(found), f"{found.meaning}\n{found.source}")
        return table


def box(size: int | tuple[int, int] = 3) -> Filter:
    """The mean of a window.

    Args:
        size: of the kernel, (height, width) or both.

    Raises:
        ValueError: a size below 1.
    """
    height, width = _size(size)
    rows = ((1 / (height * width),) * width,) * height
    return Filter("box", rows, "the mean of the window: blurs", _SMOOTHING)


def gaussian(size: int | tuple[int, int] = 5, sigma: float = 1.0) -> Filter:
    """A weighted mean whose weights fall with the distance d as exp(-d^2 / (2 sigma^2)).

    Sampled at the centres of the cells and divided by their sum, as OpenCV's getGaussianKernel is
    for odd sizes.

    Args:
        size: of the kernel, (height, width) or both; 6 sigma + 1 leaves nothing to speak of out.
        sigma: in pixels.

    Raises:
        ValueError: a size below 1, or a sigma that is not finite or so small that no weight is
            above 0.
    """
    height, width = _size(size)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0 and finite, got {sigma}")
    down, across = (
        [math.exp(-(((i - (n - 1) / 2) / sigma) ** 2) / 2) for i in range(n)]
        for n in (height, width)
    )
    total = sum(down) * sum(across)
    if total == 0:  # an even size, whose middle is between the cells
        raise ValueError(f"sigma is too small for a kernel of {height} x {width}, got {sigma}")
    rows = tuple(tuple(a * b / total for b in across) for a in down)
    meaning = f"a mean that favours the middle, sigma {sigma:g}: blurs"
    return Filter("gaussian", rows, meaning, _SMOOTHING)


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return height, width


def _filter(name: str, rows: str, meaning: str, source: str) -> Filter:
    numbers = tuple(tuple(float(cell) for cell in row.split()) for row in rows.split("/"))
    return Filter(name, numbers, meaning, source)


# "Above 0 where" is said of images whose bright cells are high, as MNIST's ink is.
FILTERS = FilterTable(
    _filter("identity", "0 0 0 / 0 1 0 / 0 0 0", "the image itself", "a 1 in the middle"),
    _filter(
        "top-edge",
        "-1 -1 -1 / 0 0 0 / 1 1 1",
        "above 0 at the top edge of something bright",
        "fastai, lesson 13; Prewitt 1970",
    ),
    _filter(
        "bottom-edge",
        "1 1 1 / 0 0 0 / -1 -1 -1",
        "above 0 at the bottom edge of something bright",
        "top-edge, negated",
    ),
    _filter(
        "left-edge",
        "-1 0 1 / -1 0 1 / -1 0 1",
        "above 0 at the left edge of something bright",
        "top-edge, transposed (the lesson's has columns -1 1 0)",
    ),
    _filter(
        "right-edge",
        "1 0 -1 / 1 0 -1 / 1 0 -1",
        "above 0 at the right edge of something bright",
        "left-edge, negated",
    ),
    _filter(
        "diag1-edge",
        "0 -1 1 / -1 1 0 / 1 0 0",
        "an edge along /, darker above it; flat areas stay",
        "fastai, lesson 13",
    ),
    _filter(
        "diag2-edge",
        "1 -1 0 / 0 1 -1 / 0 0 1",
        "an edge along \\, darker above it; flat areas stay",
        "fastai, lesson 13",
    ),
    _filter(
        "sobel-x",
        "-1 0 1 / -2 0 2 / -1 0 1",
        "8 times the slope from left to right, smoothed downwards",
        "Sobel and Feldman 1968",
    ),
    _filter(
        "sobel-y",
        "-1 -2 -1 / 0 0 0 / 1 2 1",
        "8 times the slope from top to bottom, smoothed across",
        "Sobel and Feldman 1968",
    ),
    _filter(
        "laplacian",
        "0 1 0 / 1 -4 1 / 0 1 0",
        "the second derivative: the four neighbours less the cell",
        _SHARPENING,
    ),
    _filter(
        "laplacian-8",
        "1 1 1 / 1 -8 1 / 1 1 1",
        "the same with all eight neighbours",
        _SHARPENING,
    ),
    box(),
    gaussian(),
    _filter(
        "sharpen",
        "0 -1 0 / -1 5 -1 / 0 -1 0",
        "the image less its Laplacian: exaggerates edges",
        _SHARPENING,
    ),
    _filter(
        "emboss",
        "-2 -1 0 / -1 1 1 / 0 1 2",
        "the image plus its slope to the lower right: a relief",
        "GIMP's manual, Convolution Matrix",
    ),
)


def format_number(value: float) -> str:
    """Whole numbers as such, others with three decimals."""
    rounded = round(value, 3) + 0.0  # + 0.0 makes a -0 a 0
    return f"{rounded:g}" if rounded == int(rounded) else f"{rounded:.3f}"


def format_rows(rows: Rows | list[list[float]]) -> list[str]:
    """A line for each row, its numbers aligned."""
    cells = [[format_number(value) for value in row] for row in rows]
    width = max(len(cell) for row in cells for cell in row)
    return [" ".join(cell.rjust(width) for cell in row) for row in cells]
