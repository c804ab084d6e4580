"""A folder of pictures as the data: what is read, how it is split, and that runs go on with it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

from convext.__main__ import main  # noqa: E402
from convext.commands.arguments import load_model  # noqa: E402
from convext.errors import UserError  # noqa: E402
from convext.mnist import callbacks  # noqa: E402
from convext.mnist.data import DataError, load_data  # noqa: E402
from convext.mnist.model import lesson_cnn  # noqa: E402
from convext.mnist.train import Options, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("restore_threads")


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def picture(kind, number, colour=True, size=(20, 31)):
    """A bright bar on a dark ground, lying for "flat" and standing for other kinds."""
    rng = np.random.default_rng((number, len(kind)))
    pixels = np.zeros((*size, 3), np.uint8)
    start = rng.integers(4, 12)
    bar = np.s_[start : start + 4] if kind == "flat" else np.s_[:, start : start + 4]
    pixels[bar] = rng.integers(100, 256, 3) if colour else rng.integers(100, 256)
    return pixels


def fill(folder, counts, colour=True):
    for kind, count in counts.items():
        for number in range(count):
            save(folder / kind / f"{number:02d}.png", picture(kind, number, colour))
    return folder


@pytest.fixture
def bars(tmp_path):
    return fill(tmp_path / "bars", {"upright": 12, "flat": 10})


# ---- what is read ----


def test_a_folder_is_a_class_each_and_a_fifth_is_kept_for_validation(bars):
    dataset = load_data(str(bars))
    assert dataset.name == str(bars.resolve())
    assert dataset.classes == ("flat", "upright")
    assert [(len(s), s.labels.bincount().tolist()) for s in (dataset.train, dataset.valid)] == [
        (18, [8, 10]),
        (4, [2, 2]),
    ]
    for split in (dataset.train, dataset.valid):
        assert split.images.shape[1:] == (3, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        # Flat bars run along a row: the label is that of the picture's own folder.
        grey = split.images.mean(1)
        along = grey.amax(1).amin(1) > 0.2
        assert torch.equal(along, split.labels == 0)


def test_every_picture_is_in_one_of_the_two(bars):
    dataset = load_data(str(bars), image_size=(20, 31))
    found = torch.cat([dataset.train.images, dataset.valid.images])
    found = {image.permute(1, 2, 0).mul(255).round().byte().numpy().tobytes() for image in found}
    expected = {
        picture(kind, number).tobytes()
        for kind, count in (("upright", 12), ("flat", 10))
        for number in range(count)
    }
    assert found == expected


def test_pictures_are_resized_as_pillow_does(bars):
    images = load_data(str(bars), image_size=(24, 32)).train.images
    assert images.shape[2:] == (24, 32)
    candidates = [
        np.asarray(Image.fromarray(picture("flat", number)).resize((32, 24)))
        for number in range(10)
    ]
    first = images[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    assert sum(np.array_equal(first, candidate) for candidate in candidates) == 1


def test_the_split_is_by_name_and_little_changed_by_another_file(bars):
    def kept():
        dataset = load_data(str(bars))
        return {image.numpy().tobytes() for image in dataset.valid.images}

    before = kept()
    assert kept() == before
    save(bars / "flat" / "another.png", picture("flat", 99))
    assert len(kept() - before) <= 1


def test_train_and_valid_are_taken_where_they_are_there(tmp_path):
    folder = tmp_path / "bars"
    fill(folder / "train", {"upright": 3, "flat": 4})
    fill(folder / "valid", {"flat": 1})
    dataset = load_data(str(folder))
    assert dataset.classes == ("flat", "upright")
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert dataset.valid.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("coloured", "asked", "channels"),
    [
        (False, None, 1),
        (True, None, 3),
        (True, False, 1),
        (False, True, 3),
    ],
)
def test_colour_is_what_the_files_have_or_what_is_asked(tmp_path, coloured, asked, channels):
    # Also grey pictures are saved with three channels here: pixels decide, not the file's mode.
    folder = fill(tmp_path / "bars", {"upright": 3, "flat": 3}, colour=coloured)
    images = load_data(str(folder), image_size=(20, 31), colour=asked).train.images
    assert images.shape[1] == channels
    pixels = images[0].mul(255).round().byte()
    sources = [Image.fromarray(picture("flat", number, coloured)) for number in range(3)]
    mode = "L" if channels == 1 else "RGB"
    expected = [np.asarray(s.convert(mode)).reshape(20, 31, channels) for s in sources]
    assert any(np.array_equal(pixels.permute(1, 2, 0).numpy(), e) for e in expected)


def test_nested_folders_hidden_files_and_other_formats(tmp_path):
    folder = fill(tmp_path / "bars", {"upright": 2, "flat": 2})
    save(folder / "flat" / "more" / "deeper.bmp", picture("flat", 5))
    (folder / "flat" / ".DS_Store").write_bytes(b"junk")
    (folder / ".cache").mkdir()
    dataset = load_data(str(folder))
    assert dataset.classes == ("flat", "upright")
    assert len(dataset.train) + len(dataset.valid) == 5


def damage_text(folder):
    (folder / "flat" / "00.png").write_text("hello")
    return "flat/00.png: not a picture that Pillow can read"


def damage_truncated(folder):
    path = folder / "flat" / "00.png"
    rng = np.random.default_rng(0)
    save(path, rng.integers(0, 256, (40, 40, 3)))
    path.write_bytes(path.read_bytes()[:1000])
    return "flat/00.png: "


def damage_deep(folder):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "flat" / "00.png")
    return "flat/00.png: 8 bits a channel are read, not mode I;16"


def damage_one_class(folder):
    shutil.rmtree(folder / "upright")
    return "bars: holds one class, flat; there must be at least 2"


def damage_no_class(folder):
    for kind in ("flat", "upright"):
        shutil.rmtree(folder / kind)
    return "bars: holds no folder; each class's pictures lie in one of its name"


def damage_empty_class(folder):
    (folder / "empty").mkdir()
    return "bars/empty: holds no pictures"


def damage_single_picture(folder):
    save(folder / "single" / "0.png", picture("flat", 0))
    return "bars/single: holds one picture; one to train on, one to validate with"


def damage_no_valid(folder):
    (folder / "train").mkdir()
    return "bars: holds train, so it must hold valid besides"


def damage_no_train(folder):
    (folder / "valid").mkdir()
    return "bars: holds valid, so it must hold train besides"


def damage_foreign_class(folder):
    fill(folder / "train", {"upright": 2, "flat": 2})
    fill(folder / "valid", {"round": 1})
    return "bars/valid/round: a class that "


def damage_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")
    return "bars: not a folder"


def damage_absent(folder):
    shutil.rmtree(folder)
    return "no such folder, and none of mnist, digits, auto"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_folder_is_one_line_that_names_what_is_wrong(bars, capsys, damage):
    message = damage(bars)
    assert main(["train", "--data", str(bars)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("convext train: ")
    assert err.count("\n") == 1


def test_options_of_folders_are_refused_elsewhere(bars):
    with pytest.raises(DataError, match="--image-size is for a folder of pictures"):
        load_data("mnist", image_size=(28, 28))
    with pytest.raises(DataError, match="--data-dir is where the MNIST files lie"):
        load_data(str(bars), bars)


# ---- the network for it ----


def test_the_default_network_is_what_it_was():
    torch.manual_seed(7)
    found = lesson_cnn("torch").state_dict()
    torch.manual_seed(7)
    sizes = ((1, 8, 5), (8, 16, 3), (16, 32, 3), (32, 64, 3), (64, 10, 3))
    for number, (inputs, outputs, size) in enumerate(sizes, start=1):
        layer = torch.nn.Conv2d(inputs, outputs, size)
        assert torch.equal(found[f"conv{number}.weight"], layer.weight)
        assert torch.equal(found[f"conv{number}.bias"], layer.bias)
    assert list(found) == list(lesson_cnn("torch", in_channels=3, classes=4).state_dict())


@pytest.mark.parametrize("layers", ["convext", "torch"])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (17, 32), (1, 9)])
def test_the_network_ends_in_one_score_per_class(layers, size):
    model = lesson_cnn(layers, in_channels=3, classes=4).eval()
    assert model(torch.zeros(2, 3, *size)).shape == (2, 4)


def test_the_network_refuses_what_makes_none():
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        lesson_cnn("torch", in_channels=0)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        lesson_cnn("torch", classes=0)


# ---- runs ----


def checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same_run(one, other):
    first, second = checkpoint(one), checkpoint(other)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"] for c in (first, second)]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][number][name]), name


def run(out, data, **options):
    defaults = {"threads": 1, "layers": "torch", "stats": "off", "batch_size": 4, "epochs": 3}
    train(Options(report=False, data=str(data), out=out, **{**defaults, **options}))
    return out


@pytest.fixture
def interrupted(monkeypatch):
    """Within the block, Ctrl-C comes in the second epoch, after two of its steps."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise callbacks.InterruptError

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochTable, "on_train_batch_end", on_train_batch_end)
        yield patch


def test_a_run_on_a_folder_says_what_it_is_and_keeps_it(bars, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["train", "--data", bars, "--image-size", "24x32", "--augment", "--epochs", 12]
    args += ["--layers", "torch", "--threads", 1, "--out", out]
    assert main([*map(str, args)]) == 0
    shown = capsys.readouterr().out
    for line in (
        rf"data +{re.escape(str(bars))}: 18 images to train on, 4 to validate with \(a folder for",
        r"classes +flat, upright",
        r"batch +N 8, C 3, H 24, W 32",
        r"augment +each image turned by up to 10 degrees and shifted by up to 2 pixels",
        r"conv5 .* 1 x 2 x 1 x 1 ",
    ):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
    kept = checkpoint(out)["convext"]
    assert kept["classes"] == ("flat", "upright")
    assert (kept["image_size"], kept["colour"], kept["augment"]) == ((24, 32), True, True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.75  # of 4 pictures, which a bar's direction tells apart
    assert metrics["classes"] == ["flat", "upright"]
    model = load_model(str(out))
    assert model(torch.zeros(1, 3, 24, 32)).shape == (1, 2)


@pytest.mark.parametrize("data", ["bars", "digits"])
def test_resuming_with_augmentation_gives_the_bits_of_the_run_that_was_not_stopped(
    bars, tmp_path, interrupted, data
):
    source = bars if data == "bars" else "digits"
    options = {"augment": True, **({"batch_size": 256} if data == "digits" else {})}
    with pytest.raises(KeyboardInterrupt, match="1 of 3 epochs"):
        run(tmp_path / "stopped", source, **options)
    interrupted.undo()
    train(Options(report=False, resume=tmp_path / "stopped"))
    straight = run(tmp_path / "straight", source, **options)
    assert_same_run(straight, tmp_path / "stopped")
    plain = run(tmp_path / "plain", source, **{**options, "augment": False})
    name = "model.conv1.weight"
    assert not torch.equal(
        checkpoint(plain)["state_dict"][name], checkpoint(straight)["state_dict"][name]
    )


def test_resume_takes_the_folder_wherever_it_is_but_not_another(bars, tmp_path):
    out = run(tmp_path / "run", bars, epochs=1)
    moved = bars.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder"):
        train(Options(report=False, resume=out, epochs=2))
    train(Options(report=False, resume=out, epochs=2, data=str(moved)))
    assert checkpoint(out)["convext"]["data"] == str(moved.resolve())
    for options, message in [
        ({"data": "digits"}, f"--data digits: the run to resume has {moved.resolve()}"),
        ({"image_size": (24, 32)}, "--image-size 24x32: the run to resume has 28x28"),
        ({"colour": False}, "--colour False: the run to resume has True"),
        ({"augment": True}, "--augment True: the run to resume has False"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            train(Options(report=False, resume=out, **options))
    save(moved / "flat" / "00.png", picture("flat", 55))
    with pytest.raises(UserError, match="its pictures are not those that the run began with"):
        train(Options(report=False, resume=out, epochs=3))


def test_a_run_on_digits_is_not_resumed_on_a_folder(bars, tmp_path):
    out = run(tmp_path / "run", "digits", epochs=1, batch_size=256)
    with pytest.raises(UserError, match=re.escape(f"--data {bars}: the run to resume has digits")):
        train(Options(report=False, resume=out, data=str(bars)))


def test_a_checkpoint_of_before_there_were_folders_is_still_read(tmp_path):
    out = run(tmp_path / "run", "digits", epochs=1, batch_size=256)
    saved = checkpoint(out)
    for name in ("image_size", "colour", "classes", "content", "augment"):
        del saved["convext"][name]
    torch.save(saved, out / "last.ckpt")
    assert load_model(str(out))(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    train(Options(report=False, resume=out, epochs=2))
    assert checkpoint(out)["convext"]["classes"] == tuple("0123456789")
