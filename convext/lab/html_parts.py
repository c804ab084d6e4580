"""Pieces of a page as HTML: drawings, pictures, tables with numbers, colours or bars."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from convext.inspection.drawing import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RASTER_DPI = 220  # of images within a drawing: sharp on fine screens, too

# Colours of figures -> the page's, which are others in the dark.
_IN_PAGE = {
    "#000000": "currentColor",
    "#ffffff": "var(--card)",
    COLORS[0]: "var(--first)",
    COLORS[1]: "var(--second)",
}


def drawing(figure: Figure, name: str, description: str) -> str:
    """A figure as SVG within the page, in the page's letters and with its ink.

    Args:
        figure: matplotlib's, for this page alone: it loses its background.
        name: of this drawing, unlike those of all others in the page.
        description: what it shows, for those who can't see it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)  # the page's paper
    figure.dpi = _RASTER_DPI
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        # What savefig calls, which would draw all of it once more before.
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    width, height = size.groups()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for all the page
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    for color, in_page in _IN_PAGE.items():
        body = body.replace(color, in_page)
    # Names hold for all the page, too.
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    return (
        f'<div class="chart"><svg role="img" aria-label="{escape(description)}" '
        f'viewBox="0 0 {width} {height}" style="--wide: {float(width):.0f}px">{body}</div>'
    )


def picture(pixels: Tensor, description: str, ink: bool) -> str:
    """An image (C, H, W) in [0, 1] as PNG within the page.

    Three channels are shown as colour, one as grey, or where 1 is ink as that on paper.
    """
    from PIL import Image

    cells = (pixels.clamp(0, 1) * 255).round().byte().numpy()
    shown = np.moveaxis(cells, 0, 2) if len(cells) == 3 else cells[0]
    shown = 255 - shown if ink else shown
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    height, width = shown.shape[:2]
    return (
        f'<img alt="{escape(description)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    foot: Sequence[str] | None = None,
    texts: Sequence[int] = (0,),
) -> str:
    """A table of text.

    Args:
        head: the columns' names.
        rows: cells.
        foot: a last row, of totals.
        texts: the columns that are no numbers.
    """

    def line(cells: Sequence[str], kind: str) -> str:
        return "".join(
            f"<{kind}{'' if column in texts else _RIGHT}>{escape(cell)}</{kind}>"
            for column, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    last = f"<tfoot><tr>{line(foot, 'td')}</tr></tfoot>" if foot else ""
    return (
        f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody>{last}</table></div>"
    )


_RIGHT = ' class="number"'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def confusion_table(counts: Tensor, names: Sequence[str]) -> str:
    """A confusion matrix, true classes down, whose cells are darker the larger their share of the
    row; those off the diagonal are mistakes, and of another colour.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    largest = float((shares - shares.diag().diag()).max()) or 1.0
    rows = []
    for true, name in enumerate(names):
        cells = []
        for guess, count in enumerate(counts[true].tolist()):
            share = float(shares[true, guess])
            # Mistakes are few: their scale ends with the most frequent one.
            heat = 0.15 + 0.45 * share if guess == true else 0.75 * share / largest
            kind = "right" if guess == true else "mistake"
            style = f' class="{kind}" style="--heat: {heat:.2f}"' if count else ' class="none"'
            title = f"{name} taken for {names[guess]}: {count}, {share:.1%} of {name}"
            cells.append(f'<td{style} title="{escape(title)}">{count}</td>')
        cells.append(f'<td class="sum">{int(counts[true].sum())}</td>')
        cells.append(f'<td class="sum">{float(shares[true, true]):.1%}</td>')
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        '<div class="wide"><table class="confusion"><thead><tr><td></td>'
        f'<th scope="colgroup" colspan="{len(names)}">taken for</th></tr>'
        f'<tr><th scope="col">class</th>{columns}<th scope="col">images</th>'
        f'<th scope="col">right</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """A table of names, shares as bars and in percent, and one more column of text.

    The longest bar is as wide as there is room.
    """
    largest = max(share for _, share, _ in rows)
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{escape(text)}</td>'
        f'<td class="number">{share:.1%}</td>'
        f'<td class="bar"><span style="width: {100 * share / largest:.2f}%"></span></td></tr>'
        for name, share, text in rows
    )
    head = '<th>work</th><th class="number">time</th><th class="number">share</th><th></th>'
    return (
        f'<div class="wide"><table class="bars"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
