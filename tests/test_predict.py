"""`convext predict`: pictures from files are what the run was trained on, and the exports agree."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")
pytest.importorskip("sklearn", reason="digits need scikit-learn")

import convext  # noqa: E402
from convext.__main__ import main  # noqa: E402
from convext.lab import export as export_module  # noqa: E402
from convext.lab.export import export  # noqa: E402
from convext.lab.predict import predict  # noqa: E402
from convext.mnist.data import load_digits  # noqa: E402
from convext.mnist.model import lesson_cnn  # noqa: E402
from convext.mnist.run_folder import load_trained  # noqa: E402
from convext.mnist.train import Options, train  # noqa: E402

THINGS = ("black cat", "white cat", "zebra")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on digits, and files of six validation images with their pixels of one byte each."""
    folder = tmp_path_factory.mktemp("digits")
    run_on("digits", folder / "run")
    pixels = (load_digits().valid.images[:6, 0] * 255).round().byte().numpy()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder, torch.from_numpy(pixels).unsqueeze(1).float() / 255


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory):
    """A run on a folder of noise in colour, 24x32, of three classes."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    for name in THINGS:
        (folder / "things" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "things" / name / f"{number}.png")
    run_on(str(folder / "things"), folder / "run", image_size=(24, 32))
    return folder


def run_on(data, out, **options):
    threads = torch.get_num_threads()
    train(Options(report=False, data=data, out=out, epochs=1, threads=1, stats="off", **options))
    torch.set_num_threads(threads)


def own_probabilities(run, images):
    """Those of stock layers with the checkpoint's weights, by torch alone."""
    saved = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    channels, classes = saved["model.conv1.weight"].shape[1], len(saved["model.conv5.bias"])
    model = lesson_cnn(
        "torch",
        in_channels=channels,
        classes=classes,
        normalize=([0.0] * channels, [1.0] * channels),  # which the weights replace
    )
    model.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})
    with torch.no_grad():
        return model.eval()(images).softmax(1)


def shown(capsys, *args):
    status = main(["predict", *map(str, args)])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


# ---- classes and probabilities ----


def test_probabilities_are_those_of_the_trained_weights(digits_run):
    folder, images = digits_run
    settings, model = load_trained(folder / "run", "RUN")
    found = predict(model, settings, [folder / f"{number}.png" for number in range(6)])
    assert torch.equal(found.images, images)
    expected = own_probabilities(folder / "run", images)
    assert torch.allclose(found.probabilities, expected, atol=1e-5)
    assert found.notes == ()
    for number, row in enumerate(expected):
        values, labels = row.topk(3)
        assert [name for name, _ in found.top(number)] == [str(n) for n in labels.tolist()]
        assert [p for _, p in found.top(number)] == pytest.approx(values.tolist(), abs=1e-5)


def test_each_file_is_a_line_with_its_likeliest_classes(digits_run, capsys):
    folder, images = digits_run
    out = shown(capsys, folder / "run", folder / "0.png", folder / "[1-5].png")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [str(folder / f"{n}.png") for n in range(6)]
    for line, row in zip(lines, own_probabilities(folder / "run", images), strict=True):
        values, labels = row.topk(3)
        pairs = re.findall(r"(\d) (\d+\.\d)%", line.removeprefix(line.split()[0]))
        assert [int(name) for name, _ in pairs] == labels.tolist()
        assert [float(p) for _, p in pairs] == pytest.approx((100 * values).tolist(), abs=0.06)
    one = shown(capsys, folder / "run", "--top", 1, folder / "0.png")
    assert re.fullmatch(r"\S+ +\d \d+\.\d%\n", one)


def test_a_colour_run_has_its_own_names_size_and_channels(colour_run, capsys):
    path = colour_run / "things" / "zebra" / "0.png"
    pixels = np.asarray(Image.open(path).resize((32, 24)))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    settings, model = load_trained(colour_run / "run", "RUN")
    found = predict(model, settings, [path], shown=9)
    assert torch.equal(found.images, image)
    expected = own_probabilities(colour_run / "run", image)
    assert torch.allclose(found.probabilities, expected, atol=1e-5)
    out = shown(capsys, colour_run / "run", path)
    assert set(re.findall(r"(black cat|white cat|zebra) \d+\.\d%", out)) == set(THINGS)


def test_a_picture_is_made_grey_and_brought_to_size(digits_run, tmp_path):
    folder, images = digits_run
    settings, model = load_trained(folder / "run", "RUN")
    picture = Image.open(folder / "0.png")
    picture.convert("RGB").save(tmp_path / "rgb.png")
    picture.resize((90, 70), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = predict(model, settings, [tmp_path / "rgb.png", tmp_path / "large.png"])
    assert torch.equal(found.images[:1], images[:1])
    expected = np.asarray(Image.open(tmp_path / "large.png").resize((28, 28)))
    assert np.array_equal((found.images[1, 0] * 255).round().numpy(), expected)


def test_ink_on_paper_is_noticed_and_inverted_only_when_asked(digits_run, tmp_path, capsys):
    folder, images = digits_run
    path = tmp_path / "ink.png"
    Image.fromarray(255 - np.asarray(Image.open(folder / "0.png"))).save(path)
    settings, model = load_trained(folder / "run", "RUN")
    plain, inverted = (predict(model, settings, [path], invert=yes) for yes in (False, True))
    assert torch.allclose(plain.images, 1 - images[:1])
    assert torch.allclose(inverted.images, images[:1])
    assert "looks inverted, try --invert" in shown(capsys, folder / "run", path)
    assert "inverted" not in shown(capsys, folder / "run", "--invert", path)
    wrong = shown(capsys, folder / "run", "--invert", path, folder / "1.png")
    note = wrong.splitlines()[-1]
    assert note.startswith("looks inverted by --invert")
    assert note.endswith(f": {folder / '1.png'}")


def test_a_blank_picture_is_noticed(digits_run, tmp_path, capsys):
    folder, _ = digits_run
    Image.new("L", (30, 20), 255).save(tmp_path / "blank.png")
    out = shown(capsys, folder / "run", tmp_path / "blank.png")
    note = out.splitlines()[-1]
    assert note.startswith("of one colour all over")
    assert note.endswith(f": {tmp_path / 'blank.png'}")


def test_pictures_of_a_folder_may_be_bright(colour_run, tmp_path, capsys):
    Image.fromarray(np.linspace(200, 255, 400).reshape(20, 20).astype(np.uint8)).save(
        tmp_path / "bright.png"
    )
    assert "inverted" not in shown(capsys, colour_run / "run", tmp_path / "bright.png")


def test_activations_are_drawn(digits_run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs the extra convext[plot]")
    folder, _ = digits_run
    out = shown(capsys, folder / "run", folder / "0.png", "--activations", tmp_path / "a.png")
    assert out.splitlines()[-1] == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["RUN"], "IMAGE: name at least one picture, or --export DIR"),
        (["RUN", "DIR/absent.png"], "absent.png: No such file or directory"),
        (["RUN", "DIR/*.jpg"], "*.jpg: no file fits this pattern"),
        (["RUN", "DIR/0.png", "DIR/text.png"], "text.png: not a picture that Pillow can read"),
        (["RUN", "DIR/0.png", "--top", "0"], "--top must be at least 1, got 0"),
        (["RUN", "DIR/[01].png", "--activations", "a.png"], "--activations draws one picture, g"),
        (["DIR/absent", "DIR/0.png"], "RUN: "),
        (["DIR/0.png", "DIR/0.png"], "RUN: "),
        (["DIR/old.ckpt", "DIR/0.png"], "old.ckpt: not a run of this version of convext"),
        ([], "required: RUN"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(digits_run, capsys, args, message):
    folder, _ = digits_run
    (folder / "text.png").write_text("hello")
    torch.save({"convext": {"layers": "torch"}, "state_dict": {}}, folder / "old.ckpt")
    places = {"RUN": str(folder / "run"), "DIR": str(folder)}
    args = [re.sub("^(RUN|DIR)", lambda match: places[match[0]], arg) for arg in args]
    try:
        status = main(["predict", *args])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    (folder / "text.png").unlink()
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# ---- export ----


@pytest.fixture(scope="module")
def exported(colour_run):
    """What the command wrote of the colour run."""
    pytest.importorskip("onnxscript", reason="export needs the extra convext[export]")
    folder = colour_run / "export"
    assert main(["predict", str(colour_run / "run"), "--export", str(folder)]) == 0
    return folder


def random_images(count):
    return torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_runtime_computes_what_the_run_does(colour_run, exported, count):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(exported / "model.onnx", options)
    images = random_images(count)
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    found = torch.from_numpy(scores).softmax(1)
    expected = own_probabilities(colour_run / "run", images)
    assert torch.allclose(found, expected, atol=1e-5)
    assert session.get_inputs()[0].shape[1:] == [3, 24, 32]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(THINGS)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_program_computes_what_the_run_does(colour_run, exported, count):
    files = {"classes.json": ""}
    program = torch.export.load(exported / "model.pt2", extra_files=files)
    found = program.module()(random_images(count)).softmax(1)
    expected = own_probabilities(colour_run / "run", random_images(count))
    assert torch.allclose(found, expected, atol=1e-5)
    assert json.loads(files["classes.json"]) == list(THINGS)


def test_the_program_has_stock_layers_alone(exported):
    program = torch.export.load(exported / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets
    assert not any("convext" in target for target in targets)


def test_the_export_is_two_files_and_two_lines(colour_run, exported, capfd):
    assert sorted(path.name for path in exported.iterdir()) == ["model.onnx", "model.pt2"]
    settings, model = load_trained(colour_run / "run", "RUN")
    assert settings.layers == "convext"
    wrote = export(model, (3, 24, 32), THINGS, exported)  # over the files that are there
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert isinstance(model.conv1, convext.Conv2d)
    assert isinstance(model.norm1, convext.BatchNorm2d)
    assert max(wrote.program_difference, wrote.onnx_difference) < 1e-5
    assert len(str(wrote).splitlines()) == 2


def test_an_export_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="export needs the extra convext[export]")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"model\.pt2: its scores differ from the model's"):
        export(model, (1, 2, 2), ("a", "b"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_measured_in_units_of_the_largest_score():
    images = torch.ones(1, 4)

    def difference(factor, offset):
        return export_module._difference(
            "name", lambda x: factor * x + offset, lambda x: factor * x, [images]
        )

    assert difference(0.5, 5e-5) == pytest.approx(5e-5, rel=1e-2)
    assert difference(100.0, 5e-3) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(RuntimeError, match="name: its scores differ"):
        difference(1.0, 2e-4)


def test_an_export_into_a_file_is_one_line(colour_run, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="export needs the extra convext[export]")
    (tmp_path / "file").write_text("")
    assert main(["predict", str(colour_run / "run"), "--export", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err == f"convext predict: --export: {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(colour_run, tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert main(["predict", str(colour_run / "run"), "--export", str(tmp_path)]) == 2
    assert f"needs {module}: pip install 'convext[export]'\n" in capsys.readouterr().err
