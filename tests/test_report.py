"""RUN/report.html: what it shows is what the run's files hold, and a browser shows all of it."""

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")
pytest.importorskip("matplotlib", reason="reports need the extra convext[train]")
sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra convext[digits]")

from convext.__main__ import main  # noqa: E402
from convext.errors import UserError  # noqa: E402
from convext.inspection.summary import summary  # noqa: E402
from convext.lab import op_times, report  # noqa: E402
from convext.lab.evaluation import evaluate  # noqa: E402
from convext.lab.report import write_report  # noqa: E402
from convext.lab.report_sections import command, fingerprint  # noqa: E402
from convext.mnist.data import load_data, load_digits  # noqa: E402
from convext.mnist.model import lesson_cnn  # noqa: E402
from convext.mnist.settings import Settings  # noqa: E402
from tests.browser import chromium, opened  # noqa: E402

SECTIONS = ("run", "network", "training", "layers", "mistakes", "filters", "time", "again")
TRAIN = ("train", "--data", "digits", "--threads", "1")


class Page(HTMLParser):
    """A report's sections: their text, tables as rows of cells, lists and attributes."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.tags = {"": ""}, []
        self._section, self._cells = "", None
        self.tables = {"": []}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, self._section, attributes))
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section], self.tables[self._section] = "", []
        elif tag == "table":
            self.tables[self._section].append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1][-1].append("")
            self._cells = self.tables[self._section][-1][-1]

    def handle_endtag(self, tag):
        if tag == "section":
            self._section = ""
        elif tag in ("td", "th"):
            self._cells = None

    def handle_data(self, text):
        self.sections[self._section] += text
        if self._cells is not None:
            self._cells[-1] += text

    def found(self, tag, section):
        return [attributes for t, s, attributes in self.tags if (t, s) == (tag, section)]


def page_of(folder):
    return Page((folder / "report.html").read_text())


def checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def stock_model(folder):
    """The run's network in PyTorch's layers: what the report says must not depend on ours."""
    model = lesson_cnn("torch", normalize=((0.0,), (1.0,)))  # which the weights replace
    weights = checkpoint(folder)["state_dict"].items()
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights})
    return model.eval()


def said(*args):
    """A command's status, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, args)])
    torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two epochs, and what it said."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return folder, said(*TRAIN, "--epochs", 2, "--out", folder)


@pytest.fixture(scope="module")
def page(run):
    return page_of(run[0])


@pytest.fixture(scope="module")
def scores(run):
    """Those of the validation images, and their classes."""
    valid = load_digits().valid
    with torch.no_grad():
        return stock_model(run[0])(valid.images), valid.labels


# ---- a run writes it ----


def test_a_run_ends_by_saying_where_its_report_is(run):
    folder, (status, out, err) = run
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"{folder}/report.html: all of it, for people"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_no_report_where_none_is_wanted(tmp_path):
    status, out, err = said(*TRAIN, "--epochs", 1, "--no-report", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "report.html" not in out
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_loses_nothing_and_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device\nindeed")

    monkeypatch.setattr(report, "write_report", fail)
    folder = tmp_path / "run"
    status, out, err = said(*TRAIN, "--epochs", 1, "--out", folder)
    assert status == 0
    assert err.startswith("convext train: no report.html: [Errno 28] No space left on device")
    assert err.endswith(f" (try again: convext report {folder})\n")
    assert err.count("\n") == 1
    assert "report.html" not in out
    assert json.loads((folder / "metrics.json").read_text())["epochs"] == 1
    assert len(checkpoint(folder)["history"]) == 1


# ---- what it shows ----


def test_every_section_is_there_and_none_is_empty(page):
    assert [a["id"] for tag, _, a in page.tags if tag == "section"] == list(SECTIONS)
    links = [a["href"] for a in page.found("a", "")]
    assert links == [f"#{name}" for name in SECTIONS]
    assert all(len(page.sections[name]) > 150 for name in SECTIONS)
    assert len(page.found("svg", "training")) == 2
    assert len(page.found("svg", "layers")) == 2 * 4
    assert len(page.found("svg", "filters")) == 1
    assert "$" not in page.sections[""]  # nothing of the template is left to fill in


def test_figures_are_those_of_metrics_json(run, page):
    metrics = json.loads((run[0] / "metrics.json").read_text())
    head, *rows = page.tables["run"][0]
    assert head == ["epoch", "accuracy", "validation loss", "training loss", "time"]
    for row, epoch in zip(rows, metrics["history"], strict=True):
        assert row == [
            str(epoch["epoch"]),
            f"{epoch['accuracy']:.2%}",
            f"{epoch['valid_loss']:.4f}",
            f"{epoch['train_loss']:.4f}",
            f"{epoch['train_seconds']:.2f} s",
        ]
    header = page.sections[""]
    assert f"digits: {metrics['accuracy']:.2%} right" in header
    assert f"{metrics['valid_loss']:.4f}validation loss" in header
    assert f"{metrics['train_seconds']:.1f} straining steps" in header
    assert "30,522parameters" in header
    for name, version in metrics["versions"].items():
        assert f"{name} {version}" in page.sections["run"]
    assert "2 epochs of batches of 64" in page.sections["run"]


def test_the_network_is_its_summary(page):
    described = summary(lesson_cnn("convext", normalize=((0.0,), (1.0,))), (1, 1, 28, 28))
    _, *rows, total = page.tables["network"][0]
    for row, layer in zip(rows, described.rows, strict=True):
        assert row[:3] == [layer.name, layer.type, " x ".join(map(str, layer.output_shape))]
        numbers = [int(cell.replace(",", "") or 0) for cell in row[3:]]
        assert numbers == [layer.weights, layer.biases, layer.parameters, layer.multiplications]
    assert total[-2:] == [f"{described.parameters:,}", f"{described.multiplications:,}"]


def test_layers_are_described_by_their_statistics(run, page):
    from convext.lab import ActivationStats

    stats = ActivationStats.load(run[0] / "activations.npz")
    _, *rows = page.tables["layers"][0]
    assert [row[0] for row in rows] == list(stats.layers)
    for name, mean, std, near_zero in rows:
        layer = stats.layer(name)
        assert mean == f"{layer.mean[0]:.3g} → {layer.mean[-1]:.3g}"
        assert std == f"{layer.std[0]:.3g} → {layer.std[-1]:.3g}"
        assert near_zero == f"{layer.near_zero[0]:.0%} → {layer.near_zero[-1]:.0%}"


def test_the_confusion_matrix_is_scikit_learns(run, page, scores):
    found, labels = scores
    expected = sklearn_metrics.confusion_matrix(labels, found.argmax(1))
    _, head, *rows = page.tables["mistakes"][0]
    assert head == ["class", *"0123456789", "images", "right"]
    assert [[int(cell) for cell in row[1:11]] for row in rows] == expected.tolist()
    assert [int(row[11]) for row in rows] == expected.sum(1).tolist()
    wrong = int(expected.sum() - np.trace(expected))
    assert f"{wrong} mistakes in all" in page.sections["mistakes"]
    accuracy = json.loads((run[0] / "metrics.json").read_text())["accuracy"]
    assert 1 - wrong / len(labels) == pytest.approx(accuracy)


def test_the_worst_mistakes_are_the_highest_losses(page, scores):
    image_module = pytest.importorskip("PIL.Image")
    found, labels = scores
    losses = F.cross_entropy(found.double(), labels, reduction="none")
    chances = found.double().softmax(1)
    shown = [int(item["data-image"]) for item in page.found("li", "mistakes")]
    assert len(shown) == 24
    assert len(set(shown)) == 24
    worst = losses.sort(descending=True).values[:24]
    torch.testing.assert_close(losses[shown], worst, rtol=1e-3, atol=1e-4)
    pictures = page.found("img", "mistakes")
    for place, picture in zip(shown, pictures, strict=True):
        true, guess = int(labels[place]), int(found[place].argmax())
        says = f"{true}, taken for {guess}" if true != guess else f"{true}, right but unsure"
        assert picture["alt"] == f"Validation image {place}: {says}"
        if chances[place, true] >= 0.002:
            text = page.sections["mistakes"].partition(f"image {place}")[0].rpartition("loss")[0]
            assert float(re.findall(rf"{true}: ([\d.]+)%", text)[-1]) == pytest.approx(
                100 * float(chances[place, true]), abs=0.1
            )
        data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        ink = 255 - np.asarray(image_module.open(io.BytesIO(data)), dtype=float)
        expected = load_digits().valid.images[place, 0].numpy() * 255
        assert np.abs(ink - expected).max() <= 0.51


def test_its_command_line_makes_the_same_run_again(run, page, tmp_path):
    text = re.search(r"<pre>(.*?)</pre>", (run[0] / "report.html").read_text(), re.DOTALL)[1]
    program, *args = shlex.split(text.replace("\\\n", " "))
    assert program == "convext"
    status, _, err = said(*args, "--no-report", "--out", tmp_path / "again")
    assert (status, err) == (0, "")
    again = checkpoint(tmp_path / "again")
    assert again["convext"] == checkpoint(run[0])["convext"]
    sums = re.findall(r"SHA-256 (\w{64})", page.sections["again"])
    assert sums[1] == fingerprint(again["state_dict"].values())
    other = {name: value + 1 for name, value in again["state_dict"].items()}
    assert sums[1] != fingerprint(other.values())


def test_a_command_line_leaves_nothing_to_defaults():
    settings = Settings(3, 64, 0.06, 7, "it's mine", "convext", "im2col", 2, devices=2)
    words = shlex.split(command(settings).replace("\\\n", " "))
    assert words[:2] == ["convext", "train"]
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--epochs": "3",
        "--batch-size": "64",
        "--lr": "0.06",
        "--seed": "7",
        "--data": "it's mine",
        "--layers": "convext",
        "--algorithm": "im2col",
        "--threads": "2",
        "--devices": "2",
        "--device": "cpu",
        "--stats": "off",
        "--save-every": "inf",
    }


def test_what_is_missing_or_strange_is_said(run, tmp_path):
    folder = tmp_path / "a <b>& 'c'"
    shutil.copytree(run[0], folder)
    for name in ("record.json", "activations.npz", "report.html"):
        (folder / name).unlink()
    saved = checkpoint(folder)
    saved["convext"]["epochs"] = 5
    torch.save(saved, folder / "last.ckpt")
    status, out, err = said("report", folder)
    assert (status, out, err) == (0, f"{folder}/report.html\n", "")
    found = page_of(folder)
    assert "The run is not finished: 2 of 5 epochs" in found.sections[""]
    assert f"convext train --resume {shlex.quote(str(folder))}" in found.sections[""]
    assert found.sections["training"].count("kept no record") == 2
    assert "--stats off" in found.sections["layers"]
    assert found.sections[""].count(str(folder)) == 2  # as it is, not as HTML


def test_a_run_that_was_made_longer_or_diverged_still_has_a_report(tmp_path):
    folder = tmp_path / "run"
    args = (*TRAIN, "--lr", 1e30, "--epochs", 1, "--stats", "numbers", "--no-report")
    assert said(*args, "--out", folder)[0] == 0
    status, _, err = said("train", "--resume", folder, "--epochs", 2)
    assert (status, err) == (0, "")
    found = page_of(folder)
    assert "resumed with another number of epochs" in found.sections["again"]
    assert "The run diverged" in found.sections[""]
    assert "not finite" in found.sections["run"]
    assert found.sections["mistakes"].count("scores not finite") == 24
    assert "no histograms" in found.sections["layers"]
    assert len(found.found("img", "mistakes")) == 24


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_of_ones_own_are_shown_as_they_are(tmp_path, mode):
    image_module = pytest.importorskip("PIL.Image")
    rng, names = np.random.default_rng(0), ("cats & dogs", "none")
    for label, name in enumerate(names):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(20):
            shape = (12, 20) if mode == "L" else (12, 20, 3)
            pixels = rng.integers(100 * label, 100 * label + 150, shape, dtype=np.uint8)
            image_module.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    folder = tmp_path / "run"
    args = ["train", "--data", tmp_path / "pets", "--image-size", "12x20", "--augment"]
    args += ["--threads", 1, "--epochs", 2, "--stats", "off"]
    status, _, err = said(*args, "--out", folder)
    assert (status, err) == (0, "")
    found = page_of(folder)
    assert found.sections[""].strip().startswith("pets: ")
    assert [row[0] for row in found.tables["mistakes"][0][2:]] == list(names)
    assert "moved a little at random" in found.sections["run"]
    run_of = load_data(str(tmp_path / "pets"), image_size=(12, 20))
    shown = [int(item["data-image"]) for item in found.found("li", "mistakes")]
    assert len(shown) == len(run_of.valid)
    for place, picture in zip(shown, found.found("img", "mistakes"), strict=True):
        data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(image_module.open(io.BytesIO(data)), dtype=float)
        expected = run_of.valid.images[place].permute(1, 2, 0).squeeze(2).numpy()
        assert np.abs(pixels - 255 * expected).max() <= 0.51
    text = re.search(r"<pre>(.*?)</pre>", (folder / "report.html").read_text(), re.DOTALL)[1]
    words = shlex.split(text.replace("\\\n", " "))
    assert {"--augment", "--colour" if mode == "RGB" else "--no-colour"} < set(words)
    status, _, err = said(*words[1:], "--no-report", "--out", tmp_path / "again")
    assert (status, err) == (0, "")
    weights = checkpoint(tmp_path / "again")["state_dict"].values()
    assert f"SHA-256 {fingerprint(weights)}" in found.sections["again"]
    # The report of a run whose pictures have moved, and of one whose pictures have changed.
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert said("report", folder)[0] == 2
    assert said("report", folder, "--data", tmp_path / "moved")[0] == 0
    (tmp_path / "moved" / "none" / "0.png").unlink()
    status, _, err = said("report", folder, "--data", tmp_path / "moved")
    assert status == 2
    assert err.startswith("convext report: --data: ")
    assert err.endswith("its pictures are not those that the run was on\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "RUN: .*last.ckpt: no such checkpoint"),
        ("no metrics", "RUN: .*metrics.json: No such file"),
        ("text", "RUN: .*metrics.json: not JSON"),
        ("foreign", "RUN: .*metrics.json: not written by convext train"),
        ("file", "RUN must be a folder, got the file"),
    ],
)
def test_no_run_is_one_line_and_status_2(run, tmp_path, damage, message):
    folder = tmp_path / "run"
    folder.mkdir()
    if damage != "absent":
        shutil.copy(run[0] / "last.ckpt", folder)
    if damage in ("text", "foreign"):
        (folder / "metrics.json").write_text("hello" if damage == "text" else "{}")
    status, out, err = said("report", folder / "last.ckpt" if damage == "file" else folder)
    assert (status, out) == (2, "")
    assert re.match(f"convext report: {message}", err)
    assert err.count("\n") == 1


def test_another_data_set_is_refused(run):
    from dataclasses import replace

    with pytest.raises(ValueError, match="dataset must be the run's, digits, got mnist"):
        write_report(run[0], replace(load_digits(), name="mnist"))
    with pytest.raises(UserError, match="no such checkpoint"):
        write_report(run[0] / "nowhere", load_digits())


# ---- what it is made of ----


def test_evaluation_of_scores_that_are_no_numbers():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1)[:, 0], x.flatten(1)[:, 1]], 1)

    images = torch.tensor([[5.0, 0.0], [torch.nan, 0.0], [0.0, 5.0]]).reshape(3, 1, 1, 2)
    found = evaluate(Broken(), images, torch.tensor([0, 1, 0]), batch=2)
    assert found.worst(5).tolist() == [1, 2, 0]
    assert found.confusion().sum() == 3
    with pytest.raises(ValueError, match="equally many, got 3, 2"):
        evaluate(Broken(), images, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        evaluate(Broken(), images, torch.tensor([0, 1, 0]), batch=0)


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_every_operation_that_takes_long_has_its_kind(layers):
    model, digits = lesson_cnn(layers), load_digits().train
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    others = set()
    kind_of = op_times._kind

    def noting(name):
        kind = kind_of(name)
        if kind == op_times.OTHER:
            others.add(name.removeprefix("autograd::engine::evaluate_function: "))
        return kind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_times, "_kind", noting)
        found = op_times.measure_op_times(
            model,
            digits.images,
            digits.labels,
            lambda trained: torch.optim.AdamW(trained.parameters(), fused=True),
            batch=64,
            steps=2,
        )
    assert set(found.seconds) == {*op_times.KINDS, op_times.OTHER, op_times.PYTHON}
    assert list(found.seconds.values()) == sorted(found.seconds.values(), reverse=True)
    assert others <= {
        *("aten::flatten", "aten::ones_like", "aten::add_", "ViewBackward0"),
        "torch::autograd::AccumulateGrad",
    }
    assert (found.batch, found.steps) == (64, 2)
    assert "convolutions, backward" in str(found)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_times_that_cannot_be_measured_are_refused():
    digits = load_digits().train
    arguments = (lesson_cnn("torch"), digits.images, digits.labels, torch.optim.SGD)
    with pytest.raises(ValueError, match="batch and steps must be at least 1, got 0 and 5"):
        op_times.measure_op_times(*arguments, batch=0)
    with pytest.raises(ValueError, match="on the CPU"):
        op_times.measure_op_times(lesson_cnn("torch").to("meta"), *arguments[1:], batch=1)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


CUT = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})"""


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_of_it(browser, run, width, scheme):
    size = {"width": width, "height": 900}
    path = run[0] / "report.html"
    assert path.stat().st_size < 1_500_000
    with opened(browser, path, viewport=size, color_scheme=scheme) as shown:
        assert shown.title().startswith("scikit-learn's digits: ")
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        images = shown.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
        assert len(images) == 24
        assert all(natural == 28 and alt for natural, alt in images)
        drawings = shown.locator("svg[role=img]")
        assert drawings.count() == 11
        assert all(drawings.nth(n).get_attribute("aria-label") for n in range(11))
        rasters = shown.evaluate(
            "[...document.querySelectorAll('svg image')].map(i => i.href.baseVal)"
        )
        assert len(rasters) >= 4 + 4 + 2  # histograms, their scales, filters
        assert all(data.startswith("data:image/png;base64,") for data in rasters)
        assert shown.evaluate(CUT) == []
        strokes = shown.evaluate(
            "[...new Set([...document.querySelectorAll('svg *')]"
            ".map(e => getComputedStyle(e).stroke))]"
        )
        assert len(strokes) > 2
        assert scheme == "light" or "rgb(0, 0, 0)" not in strokes
        names = shown.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(names) == len(set(names))
        targets = shown.evaluate(
            "[...document.querySelectorAll('svg use')].filter("
            "u => !document.querySelector(u.href.baseVal)).length"
        )
        assert targets == 0
        ink, paper = shown.evaluate(
            "[getComputedStyle(document.querySelector('svg text')).fill,"
            " getComputedStyle(document.querySelector('section')).backgroundColor]"
        )
        light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
        assert light[0] < 200 < 600 < light[1] or light[1] < 200 < 600 < light[0]
        assert (light[0] < light[1]) == (scheme == "light")
