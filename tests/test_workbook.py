"""The workbook: LibreOffice computes it anew, and every cell must be the model's number.

That its arrows lead to the right cells is read off the formulas, without LibreOffice.
"""

import copy
import functools
import re
from dataclasses import dataclass

import pytest
import torch
from office import SOFFICE, recalculated
from torch import nn
from torch.nn import functional as F

import convext
from convext.inspection import write_workbook
from convext.inspection.example import conv_example
from convext.inspection.tape import record
from convext.mnist.model import lesson_cnn

openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed: convext[xlsx]")

from openpyxl.formula import Tokenizer  # noqa: E402
from openpyxl.utils import range_boundaries  # noqa: E402

from convext.inspection.spreadsheet.layout import lay_out  # noqa: E402
from convext.inspection.spreadsheet.text import place, row_and_column  # noqa: E402


class Settings(nn.Module):
    """Each setting of the layers, height unlike width, and every second one in a padding mode."""

    def __init__(self, conv=convext.Conv2d, norm=convext.BatchNorm2d):
        super().__init__()
        self.conv = conv(4, 6, (3, 2), (2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
        self.norm = norm(6)
        self.depthwise = conv(6, 6, 3, padding=1, groups=6, bias=False)
        self.mirrored = conv(6, 4, (2, 3), padding="same", padding_mode="reflect")
        self.far = conv(4, 3, 2, stride=(1, 3), padding=(3, 1))
        self.plain = norm(3, affine=False)
        self.first = nn.Linear(3 * 3 * 2, 7)
        self.second = nn.Linear(7, 5, bias=False)
        for module in (self.norm, self.plain):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)), (2, 3), 1, padding=1, dilation=(2, 1))
        x = F.leaky_relu(self.mirrored(self.depthwise(x)), 0.1)
        x = F.avg_pool2d(self.far(x), (3, 2), 2, padding=1, ceil_mode=True)
        x = F.relu6(F.adaptive_avg_pool2d(self.plain(x), (3, 2)))
        return torch.log_softmax(self.second(torch.sigmoid(self.first(x.flatten(1)))), 1)


class Branches(nn.Module):
    """Residual, cut, joined and scaled branches, and one number per channel at the end."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.same = convext.ConvBlock2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 5, 1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.dense = nn.Linear(5, 3)

    def forward(self, x):
        x = self.conv(F.pad(x, (1, 0, 0, 2), value=0.5))
        x = self.relu(x + self.same(x))
        first, second = x.split([1, 3], dim=1)
        x = torch.cat([second, F.avg_pool2d(first, 3, 1, 1, count_include_pad=False)], dim=1)
        x = (x * self.scale - 0.25) / 2 + torch.tanh(x.flip(3))
        x = self.last(F.adaptive_max_pool2d(x, 2)).mean((2, 3))
        return self.dense(x.softmax(1))


@dataclass
class Case:
    """A model, what it reads, and a weight to change: (parameter, index)."""

    model: nn.Module
    input: torch.Tensor
    changed: str

    def __post_init__(self):
        self.model.eval()

    @functools.cached_property
    def layout(self):
        return lay_out(self.model, self.input)

    def change(self):
        """The same with another pixel and another weight, and both changes by old number."""
        model, input = copy.deepcopy(self.model), self.input.clone()
        weight = dict(model.named_parameters())[self.changed]
        pixels, weights = input.view(-1), weight.data.view(-1)
        pixel, position = len(pixels) // 2, len(weights) // 2
        changes = {float(pixels[pixel]): 1.5, float(weights[position]): -0.75}
        pixels[pixel], weights[position] = 1.5, -0.75
        return model, input, changes


def cases():
    torch.manual_seed(1)
    stock = Settings(nn.Conv2d, nn.BatchNorm2d)
    size = (1, 4, 9, 7)
    return {
        "example": Case(conv_example(), torch.rand(1, 1, 28, 28), "conv2.weight"),
        "settings": Case(Settings().double(), torch.rand(size).double(), "conv.weight"),
        "stock": Case(stock.double(), torch.rand(size).double(), "far.weight"),
        "unbatched": Case(stock.conv, torch.rand(4, 8, 5).double(), "bias"),
        "branches": Case(Branches().double(), torch.rand(1, 2, 7, 5).double(), "same.conv.weight"),
        "vector": Case(
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.rand(1, 6), "0.bias"
        ),
    }


CASES = cases()
LESSON = Case(lesson_cnn(), torch.rand(1, 1, 28, 28), "conv4.weight")


def numbers(sheet, cells):
    values = [sheet.cell(*row_and_column(cell)).value for cell in cells.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(cells.shape)


def edit(source, target, changes):
    """What a user does: other numbers in place of some."""
    workbook = openpyxl.load_workbook(source)
    wanted = {f"{old:.14g}": new for old, new in changes.items()}
    for row in workbook["network"].iter_rows():
        for cell in row:
            if isinstance(cell.value, float) and f"{cell.value:.14g}" in wanted:
                cell.value = wanted.pop(f"{cell.value:.14g}")
    assert not wanted
    workbook.save(target)


def computed_by_libreoffice(cases, folder):
    """By case, its workbook's numbers and those after a change."""
    if SOFFICE is None:
        pytest.skip("no soffice on PATH: LibreOffice computes the workbooks")
    paths = []
    for name, case in cases.items():
        path = write_workbook(case.model, case.input, folder / f"{name}.xlsx")
        changed = folder / f"{name}-changed.xlsx"
        edit(path, changed, case.change()[2])
        paths += [path, changed]
    sheets = [
        openpyxl.load_workbook(path, data_only=True)["network"]
        for path in recalculated(paths, folder)
    ]
    return {name: sheets[2 * i : 2 * i + 2] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return computed_by_libreoffice(CASES, tmp_path_factory.mktemp("workbooks"))


def check_every_cell(case, before, after):
    model, input, _ = case.change()
    for sheet, tape in ((before, case.layout.tape), (after, record(model, input))):
        for step, cells in zip(tape.steps, case.layout.cells, strict=True):
            error = (numbers(sheet, cells) - step.value).abs().max()
            close = 1e-12 if step.value.dtype == torch.float64 else 1e-5
            assert error < close * max(1, step.value.abs().max()), step.name
    last = case.layout.cells[-1]
    assert (numbers(before, last) - numbers(after, last)).abs().max() > close  # the change counts


@pytest.mark.parametrize("name", CASES)
def test_libreoffice_computes_every_cell_of_every_layer_before_and_after_a_change(name, computed):
    check_every_cell(CASES[name], *computed[name])


@pytest.mark.slow
def test_libreoffice_computes_the_lessons_network(tmp_path):
    check_every_cell(LESSON, *computed_by_libreoffice({"lesson": LESSON}, tmp_path)["lesson"])


def references(sheet, cell, known):
    """The cells that one cell's formula names."""
    if cell not in known:
        content = sheet.cell(*row_and_column(cell)).value
        tokens = Tokenizer(content).items if str(content).startswith("=") else []
        areas = [range_boundaries(t.value) for t in tokens if t.subtype == "RANGE"]
        known[cell] = {
            place(row, column)
            for left, top, right, bottom in areas
            for row in range(top, bottom + 1)
            for column in range(left, right + 1)
        }
    return known[cell]


def traced(sheet, cell, known):
    """What "Trace Precedents" shows, pressed until no arrow is new; the cell included."""
    found, new = set(), {cell}
    while new:
        found |= new
        new = set().union(*(references(sheet, cell, known) for cell in new)) - found
    return found


@pytest.mark.parametrize("name", [*CASES, pytest.param("lesson", marks=pytest.mark.slow)])
def test_formulas_name_exactly_the_precedents(name):
    layout = (LESSON if name == "lesson" else CASES[name]).layout
    tape, sheet, known = layout.tape, layout.workbook["network"], {}
    places = [set(cells.flatten().tolist()) for cells in layout.cells]
    # What only moves numbers has no cells of its own to compare.
    own = [i for i in range(len(places)) if not places[i] & set().union(*places[:i])]
    assert len(own) > 1
    for step in tape.steps:
        for position in sorted({0, step.value.numel() // 2, step.value.numel() - 1}):
            mask = torch.zeros(step.value.shape, dtype=torch.bool)
            mask.view(-1)[position] = True
            read = traced(sheet, float(layout.cells[step.index][mask]), known)
            reached = tape.precedents(step.index, mask)
            for source in set(own) & set(reached):
                expected = set(layout.cells[source][reached[source]].tolist())
                assert read & places[source] == expected


def test_every_cell_but_the_inputs_is_a_formula():
    for case in CASES.values():
        sheet = case.layout.workbook["network"]
        for step, cells in zip(case.layout.tape.steps[1:], case.layout.cells[1:], strict=True):
            contents = [sheet.cell(*row_and_column(c)).value for c in cells.flatten().tolist()]
            moved = step.kind in ("unsqueeze",)  # the input's own cells
            assert moved or all(str(c).startswith("=") for c in contents), step.name


def test_formulas_are_those_of_the_lesson():
    layout = CASES["example"].layout
    sheet = layout.workbook["network"]

    def formula(name):
        return sheet.cell(*row_and_column(layout.cells[layout.tape.find(name).index].flatten()[0]))

    pattern = r"=SUMPRODUCT\((\w+:\w+),(\$\w+\$\d+:\$\w+\$\d+)\)"
    window, kernel = re.fullmatch(pattern, formula("conv1").value).groups()
    assert [[c.value for c in row] for row in sheet[kernel]] == [[-1] * 3, [0] * 3, [1] * 3]
    pixels = [[c.value for c in row] for row in sheet[window]]
    assert torch.equal(torch.tensor(pixels), CASES["example"].input[0, 0, :3, :3])
    assert formula("relu1").value == f"=MAX(0,{formula('conv1').coordinate})"
    assert formula("conv2").value.count("SUMPRODUCT") == 2  # one per input channel
    assert re.fullmatch(r"=MAX\(\w+:\w+\)", formula("pool").value)
    assert re.fullmatch(r"=SUMPRODUCT\(.*\)\+SUMPRODUCT\(.*\)\+\$\w+\$\d+", formula("dense").value)


def test_weights_and_input_are_exact(tmp_path):
    case = CASES["example"]
    path = write_workbook(case.model, case.input, tmp_path / "example.xlsx")
    sheet = openpyxl.load_workbook(path)["network"]
    assert torch.equal(numbers(sheet, case.layout.cells[0]).float(), case.input)
    written = {value for row in sheet.iter_rows(values_only=True) for value in row}
    written = torch.tensor([v for v in written if isinstance(v, float)]).tolist()  # float32
    assert set(case.model.dense.weight.flatten().tolist()) <= set(written)


def test_contents_link_to_the_layers():
    workbook = CASES["example"].layout.workbook
    contents, sheet = workbook["contents"], workbook["network"]
    rows = list(contents.iter_rows(min_row=2, max_row=contents.max_row - 1))
    names = [step.name for step in CASES["example"].layout.tape.steps]
    assert [row[0].value for row in rows] == names
    for row in rows:
        assert row[0].hyperlink.location == f"network!{row[4].value}"
    formulas = [c for row in sheet.iter_rows() for c in row if c.data_type == "f"]
    assert contents.cell(contents.max_row, 4).value == len(formulas) == 5306


def test_an_operation_without_a_formula_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "gelu.xlsx"
    path.write_text("before")
    with pytest.raises(NotImplementedError, match=r"1: no formula is known for aten\.gelu"):
        write_workbook(nn.Sequential(nn.Conv2d(1, 1, 3), nn.GELU()), torch.rand(1, 1, 5, 5), path)
    with pytest.raises(NotImplementedError, match="transposed"):
        write_workbook(nn.ConvTranspose2d(1, 1, 3), torch.rand(1, 1, 5, 5), path)
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    with pytest.raises(NotImplementedError, match="without running statistics"):
        write_workbook(norm, torch.rand(1, 1, 5, 5), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (nn.ReLU(), (2, 1, 4, 4), r"input must be one image .*, got \(2, 1, 4, 4\)"),
        (nn.ReLU(), (1, 1, 0, 4), "input must hold numbers"),
        (nn.ReLU(), (1, 1, 800, 800), "1,280,000 cells, at most 500,000"),
        (nn.Conv2d(1200, 1, 1, bias=False), (1, 1200, 1, 1), "a formula of .* characters"),
        (nn.ReLU(), (1, 1, 1, 17000), "column 17,002 of the sheet, which has 1,048,576 and 16,384"),
    ],
    ids=["images", "empty", "cells", "formula", "columns"],
)
def test_bad_input(model, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_workbook(model, torch.zeros(size), tmp_path / "model.xlsx")
    assert not list(tmp_path.iterdir())


def test_numbers_that_no_cell_holds_and_other_files(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        write_workbook(nn.ReLU(), torch.full((1, 1, 2, 2), torch.nan), tmp_path / "a.xlsx")
    conv = nn.Conv2d(1, 1, 1)
    conv.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity"):
        write_workbook(conv, torch.rand(1, 1, 2, 2), tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match=r"path must end in \.xlsx, got '.*a\.xls'"):
        write_workbook(conv, torch.rand(1, 1, 2, 2), tmp_path / "a.xls")
    assert not list(tmp_path.iterdir())
