"""A page to explore a network in: one file, which any browser opens without a network.

The templates beside this file are joined into it: page.html, its style page.css, and the scripts
page_cells.js (which cells an operation joins, and its sums), page_draw.js (grids and colours),
page_sum.js (the panel) and page.js (mouse and keys).
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template

from torch import Tensor, nn

from convext.inspection.page_data import page_data
from convext.inspection.tape import record
from convext.mnist.run_folder import replacing

SCRIPTS = ("page_cells.js", "page_draw.js", "page_sum.js", "page.js")


def write_page(model: nn.Module, input: Tensor, path: str | Path) -> Path:
    """Writes an interactive page: the image, every layer's kernels and activations, as grids.

    Pointing at a cell lights the cells that it reads in the layer before, and those that these
    depend on down to the image, and writes out the sum, maximum or formula that gives its number.
    The page does that with the values of this one run and the model's weights, all of which it
    holds; it asks for nothing else.

    Written out are convolutions (of every stride, padding, dilation and groups), max and mean
    pools, ReLU, batch norm in evaluation mode, linear layers, additions, softmax and means, of
    stock layers or ours. Another operation that a `Tape` follows is shown with its value and the
    cells that it reads.

    Args:
        model: any module; it is left as it was.
        input: one image, (1, C, H, W), or whatever the model takes with a first axis of 1.
        path: of the file, an HTML page; one that is there is replaced.

    Returns:
        The path.

    Raises:
        ValueError: input is not one image, or there are too many numbers for a page.
        NotImplementedError: an operation whose cells are not known, or are too many to list.
        FileNotFoundError: there is no such folder to write into.
    """
    path = Path(path)
    if input.dim() < 2 or input.shape[0] != 1:
        raise ValueError(f"input must be one image (1, C, H, W), got shape {tuple(input.shape)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent} to write {path.name} into")
    tape = record(model, input)
    # In a script element "<" may begin what ends it.
    data = json.dumps(page_data(tape), separators=(",", ":")).replace("<", "\\u003c")
    name = type(model).__name__
    page = Template(_part("page.html")).substitute(
        title=html.escape("Inside a network" if type(model) is nn.Sequential else f"Inside {name}"),
        style=_part("page.css"),
        data=data,
        script="\n".join(map(_part, SCRIPTS)),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _part(name: str) -> str:
    return (files("convext.inspection") / name).read_text(encoding="utf-8")
