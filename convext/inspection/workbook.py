"""A spreadsheet that computes a network: every cell of every layer is a live formula."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from convext.mnist.run_folder import replacing


def write_workbook(model: nn.Module, input: Tensor, path: str | Path) -> Path:
    """Writes a model's run on one image as a spreadsheet, in which each layer is formulas.

    One sheet holds it all, since a spreadsheet draws the arrows of "Trace Precedents" within a
    sheet only: the input, and then for each operation its weights and, right of them, its output,
    channels below each other. An output cell of a convolution is `=SUMPRODUCT(window, kernel)` per
    input channel, added up; the part of a window that lies in the padding is left out. What only
    reshapes has no cells of its own. A second sheet lists the layers, with links. Weights and input
    are written in full precision (16 digits), and the spreadsheet computes in float64.

    The lesson's spreadsheet network gives 5,306 formulas in 98 KB, the lesson's CNN 9,370 formulas
    over 30,762 weights and statistics in 701 KB; LibreOffice opens, computes and saves either in
    about five seconds.

    Args:
        model: any module made of 2d convolutions, batch norms, pools, activations, dense layers,
            softmax, sums and reshaping; RULES in convext/inspection/spreadsheet/
            rules.py lists the operations.
        input: one image, (1, C, H, W) or (C, H, W), or one vector, (1, F).
        path: of the file, *.xlsx. One that is there is replaced, when the new one is complete.

    Returns:
        The path.

    Raises:
        NotImplementedError: an operation without a formula, which is named; nothing is written.
        ValueError: more than one image, more cells than 500,000 or than a sheet's columns and rows
            hold, a number that is not finite, or a path that is not *.xlsx.
        ModuleNotFoundError: openpyxl, the extra [xlsx], is not installed.
    """
    path = Path(path)
    if path.suffix != ".xlsx":
        raise ValueError(f"path must end in .xlsx, got {str(path)!r}")
    from convext.inspection.spreadsheet.layout import lay_out  # imports openpyxl, an extra

    workbook = lay_out(model, input).workbook
    with replacing(path) as temporary:
        workbook.save(temporary)
    return path
