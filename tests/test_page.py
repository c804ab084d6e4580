"""The interactive page, in a browser: what it lights is on the tape, what it adds up the kernel's.

The cells that should light up come from `Tape.precedents` and `Tape.dependents`, which work by the
transposes of linear maps; the page finds them in JavaScript, by windows.
"""

import base64
import json
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext.inspection import write_page
from convext.inspection.example import conv_example
from convext.inspection.page_data import page_data
from convext.inspection.tape import record
from convext.mnist.model import lesson_cnn
from tests.browser import chromium, opened


class Settings(nn.Module):
    """Height unlike width in every setting, groups, branches and pools of all kinds."""

    def __init__(self):
        super().__init__()
        self.wide = convext.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.norm = convext.BatchNorm2d(4)
        self.groups = nn.Conv2d(4, 6, 3, padding="same", groups=2)
        self.depthwise = convext.Conv2d(6, 12, (1, 3), groups=6, bias=False)
        self.max = nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), ceil_mode=True)
        self.mean = nn.AvgPool2d((2, 3), stride=2, padding=(1, 1), ceil_mode=True)
        self.dilated = nn.MaxPool2d(2, stride=1, dilation=2)
        self.dense = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.wide(x)))
        x = self.depthwise(self.groups(x) + F.pad(x, (0, 0, 0, 0, 1, 1)))
        first, second = self.max(x).split([4, 8], dim=1)
        x = self.mean(torch.cat([F.gelu(second), first], dim=1))
        return self.dense(self.dilated(x).mean((2, 3))).softmax(1)


def shaken(model):
    """Running statistics, gammas and betas that no two channels share, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-2, 2)
            module.bias.data.normal_()
    return model.eval()


NETWORKS = {
    "example": (conv_example, (1, 1, 28, 28)),
    "lesson": (lesson_cnn, (1, 1, 28, 28)),
    "stock": (lambda: lesson_cnn("torch"), (1, 1, 28, 28)),
    "settings": (Settings, (1, 3, 13, 10)),
}
WALKS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("lesson", "stock") else [])
    for name in NETWORKS
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the tape, and the file of its page."""
    made = {}
    for name, (make, size) in NETWORKS.items():
        torch.manual_seed(0)
        model, x = shaken(make()), torch.rand(size)
        path = write_page(model, x, tmp_path_factory.mktemp("pages") / f"{name}.html")
        made[name] = (record(model, x), path)
    return made


PLAIN = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{NO-BREAK SPACE}": " ",
    }
)


def text_of(page, selector):
    return page.inner_text(selector).translate(PLAIN)


def lit_on(page):
    return json.loads(page.evaluate("JSON.stringify(convext.lit())"))


def mask_of(step, cell):
    mask = torch.zeros(step.value.shape, dtype=torch.bool)
    mask.view(-1)[cell] = True
    return mask


def cells_of(masks, tape):
    return {tape.steps[i].name: m.flatten().nonzero()[:, 0].tolist() for i, m in masks.items()}


def cells_to_try(step, count=2):
    """The first and last cell, and some between."""
    size = step.value.numel()
    return sorted({0, size - 1, *(size * i // count + i for i in range(1, count))} & {*range(size)})


def hover(page, layer, cell):
    at = page.evaluate("([layer, cell]) => convext.where(layer, cell)", [layer, cell])
    page.mouse.move(at["x"], at["y"])
    page.wait_for_function(
        "([layer, cell]) => { const lit = convext.lit(); "
        "return lit.layer === layer && lit.cell === cell; }",
        arg=[layer, cell],
    )
    return lit_on(page)


@pytest.mark.parametrize("name", WALKS)
def test_a_cells_precedents_light_and_its_sum_is_the_kernels_number(browser, networks, name):
    """The first cell of each step is pointed at; the sums are the page's own, to six digits."""
    tape, path = networks[name]
    written = set()
    with opened(browser, path) as page:
        for step in tape.steps:
            for turn, cell in enumerate(cells_to_try(step)):
                if turn == 0:
                    hover(page, step.name, cell)
                else:
                    page.evaluate("([layer, cell]) => convext.show(layer, cell)", [step.name, cell])
                lit = lit_on(page)
                masks = tape.precedents(step.index, mask_of(step, cell))
                assert lit["precedents"] == cells_of(masks, tape)
                sources = [tape.steps[i].name for i in dict.fromkeys(step.inputs)]
                assert list(lit["direct"]) == sources
                for layer, cells in lit["direct"].items():
                    # All that is lit in a source, unless another way leads there.
                    assert set(cells) <= set(lit["precedents"][layer])
                    assert cells == lit["precedents"][layer] or len(sources) > 1
                value = float(step.value.flatten()[cell])
                assert float(text_of(page, "#value")) == pytest.approx(value, rel=6e-6)
                if page.locator("#total").count():
                    total = float(text_of(page, "#total"))
                    assert total == pytest.approx(value, rel=2e-5, abs=2e-6)
                    assert "the sum below gives" not in text_of(page, ".result").replace(
                        "the sum below gives the layer's own number", ""
                    )
                    written.add(step.kind)
    copied = {"input", "view", "split", "split_with_sizes", "cat", "constant_pad_nd", "gelu"}
    assert {step.kind for step in tape.steps} - written <= copied


@pytest.mark.parametrize("name", ["example", "settings"])
def test_what_depends_on_a_cell_lights_on_request(browser, networks, name):
    tape, path = networks[name]
    with opened(browser, path) as page:
        assert lit_on(page)["dependents"] is None
        page.get_by_label("light what depends on it").check()
        for step in tape.steps[:-1]:
            for cell in cells_to_try(step):
                page.evaluate("([layer, cell]) => convext.show(layer, cell)", [step.name, cell])
                lit = lit_on(page)["dependents"]
                expected = cells_of(tape.dependents(step.index, mask_of(step, cell)), tape)
                # The page lists earlier steps too, of which nothing depends on the cell.
                assert lit == {**{s.name: [] for s in tape.steps[: step.index]}, **expected}


def test_a_sum_is_written_out(browser, tmp_path):
    """By hand: two channels of a 3x3 image, a 2x2 kernel, padding at the left and right."""
    conv = convext.Conv2d(2, 1, 2, padding=(0, 1))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.0], [-1.0, 0.0]]]]))
        conv.bias.fill_(-7.0)
    x = torch.arange(18.0).reshape(1, 2, 3, 3)
    with opened(browser, write_page(conv, x, tmp_path / "conv.html")) as page:
        layer = page.evaluate("convext.lit().layer")
        hover(page, layer, 1)  # row 0, column 1: the kernel on columns 0 and 1
        text = text_of(page, "#sum")
        assert "0 x 1 + 1 x 2 + 3 x 3 + 4 x 4" in text
        assert "27 - 7.5 - 7 (bias) = 12.5" in text
        assert page.locator(".padding").count() == 0
        hover(page, layer, 0)  # its left column is padding, and drops out of the sum
        text = text_of(page, "#sum")
        assert "0 x 2 + 3 x 4" in text
        assert "12 + 0 - 7 (bias) = 5" in text
        assert page.locator(".padding").count() == 4


def test_the_winner_of_a_maximum_is_marked(browser, tmp_path):
    x = torch.tensor([[1.0, 5.0], [-2.0, 3.0]]).reshape(1, 1, 2, 2)
    with opened(browser, write_page(nn.MaxPool2d(2), x, tmp_path / "max.html")) as page:
        assert "max(1, 5, -2, 3) = 5" in text_of(page, "#sum")
        assert page.inner_text(".winner") == "5"


def test_a_sum_that_is_not_the_layers_number_is_told(browser, networks, tmp_path):
    """The page adds up for itself: with another bias in its data, it says so."""
    _, path = networks["example"]
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    dense = data[-1]["rule"]["bias"]
    bias = np.frombuffer(base64.b64decode(dense["f4"]), "<f4") + np.float32(0.001)
    other = tmp_path / "other.html"
    other.write_text(text.replace(dense["f4"], base64.b64encode(bias.tobytes()).decode()))
    for file, told in ((path, "gives the layer's own number"), (other, "the sum below gives ")):
        with opened(browser, file) as page:
            hover(page, "dense", 2)
            assert told in text_of(page, "#sum")


def test_numbers_of_few_bits_and_none(browser, tmp_path):
    """bfloat16 rounds a sum to three digits; a NaN is shown and stops nothing."""
    torch.manual_seed(0)
    model, x = nn.Linear(40, 3).bfloat16(), torch.rand(1, 40).bfloat16()
    with opened(browser, write_page(model, x, tmp_path / "few.html")) as page:
        assert "the layer's own number, up to rounding" in text_of(page, "#sum")
        assert float(text_of(page, "#value")) == pytest.approx(model(x).max().item(), rel=6e-6)
    x[0, 7] = float("nan")
    with opened(browser, write_page(model, x, tmp_path / "none.html")) as page:
        assert text_of(page, "#value") == text_of(page, "#total") == "NaN"
        assert lit_on(page)["cell"] == 0


def test_the_keyboard_alone_reaches_every_cell(browser, networks):
    tape, path = networks["lesson"]
    with opened(browser, path) as page:
        for _ in range(60):
            page.keyboard.press("Tab")
            label = page.evaluate("document.activeElement.getAttribute('aria-label')") or ""
            if label.startswith("conv3, 32 "):
                break
        for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)  # to the corner, and no further
        for key in ("]", "]", "]", "[", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        lit = lit_on(page)
        cell = 2 * 16 + 1 * 4 + 1
        assert (lit["layer"], lit["cell"]) == ("conv3", cell)
        step = tape.find("conv3")
        assert lit["precedents"] == cells_of(tape.precedents(step.index, mask_of(step, cell)), tape)
        said = page.inner_text("#live")
        assert said.startswith("conv3, channel 2, row 1, column 1: ")
        assert "Reads 144 of norm2." in said
        style = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(style) == "solid"
        page.keyboard.press("d")
        assert lit_on(page)["dependents"] is not None


def test_pinning_holds_the_cell_until_escape(browser, networks):
    _, path = networks["example"]
    with opened(browser, path) as page:
        hover(page, "conv1", 30)
        page.mouse.down()
        page.mouse.up()
        assert page.evaluate("convext.lit().pinned")
        at = page.evaluate("convext.where('relu1', 90)")
        page.mouse.move(at["x"], at["y"])
        page.wait_for_timeout(100)
        lit = lit_on(page)
        assert (lit["layer"], lit["cell"]) == ("conv1", 30)
        page.keyboard.press("Escape")
        hover(page, "relu1", 91)
        page.locator("canvas.cells").nth(3).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert "pinned" in page.inner_text("#sum")
        assert page.evaluate("convext.lit().layer") == "conv2"
        hover_at = page.evaluate("convext.where('relu1', 0)")
        page.mouse.move(hover_at["x"], hover_at["y"])
        page.keyboard.press("Escape")
        assert "pinned" not in page.inner_text("#sum")


def test_odd_names_are_text_and_no_markup(browser, tmp_path):
    name = "</script><b id=odd>&amp;"
    model = nn.Sequential(OrderedDict({name: nn.Conv2d(1, 1, 2), "<i>": nn.ReLU()}))
    with opened(browser, write_page(model, torch.rand(1, 1, 4, 4), tmp_path / "odd.html")) as page:
        assert page.locator("#odd").count() == 0
        assert page.inner_text("#sum h2") == name
        hover(page, "<i>", 3)
        assert name in page.inner_text("main")
        assert page.evaluate("convext.lit().direct") == {name: [3]}


def test_dark_and_narrow_screens_and_reduced_motion(browser, networks):
    _, path = networks["lesson"]
    background = "getComputedStyle(document.body).backgroundColor"
    colours = set()
    for scheme in ("light", "dark"):
        with opened(browser, path, color_scheme=scheme) as page:
            colours.add(page.evaluate(background))
    assert len(colours) == 2
    narrow = {"width": 420, "height": 800}
    with opened(browser, path, viewport=narrow, reduced_motion="reduce") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
        assert page.locator("#value").is_visible()
        hover(page, "conv4", 130)


def test_a_step_that_is_not_written_out_still_has_its_cells():
    """They are listed, by sets of outputs that read the same ones."""
    tape = record(nn.ConvTranspose2d(2, 3, 3, stride=2), torch.rand(1, 2, 3, 2))
    entry = page_data(tape)[-1]
    assert entry["rule"] == {"name": "other"}
    units = [
        [np.frombuffer(base64.b64decode(part["i4"]), "<i4").tolist() for part in unit]
        for unit in entry["joins"]["units"]
    ]
    assert sorted(cell for outputs, _ in units for cell in outputs) == [*range(3 * 7 * 5)]
    for outputs, cells in units:
        for cell in outputs:
            masks = tape.precedents(1, mask_of(tape.steps[1], cell))
            assert cells == cells_of(masks, tape)["input"]


class Sorting(nn.Module):
    def forward(self, x):
        return x.sort(dim=-1).values


def test_errors_are_told_before_a_file_is_written(tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"input must be one image .* got shape \(2, 1, 28, 28\)"):
        write_page(conv_example(), torch.rand(2, 1, 28, 28), path)
    with pytest.raises(NotImplementedError, match=r"sort: which cells aten\.sort"):
        write_page(Sorting(), torch.rand(1, 1, 4, 4), path)
    with pytest.raises(FileNotFoundError, match="path: there is no folder"):
        write_page(conv_example(), torch.rand(1, 1, 28, 28), tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match=r"at most 2,000,000 activations .* got 2,160,000;"):
        write_page(nn.ReLU(), torch.rand(1, 3, 600, 600), path)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_small_and_the_model_left_as_it_was(tmp_path):
    model = lesson_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = write_page(model, torch.rand(1, 1, 28, 28), str(tmp_path / "page.html"))
    assert path == tmp_path / "page.html"
    assert path.stat().st_size < 500_000
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
