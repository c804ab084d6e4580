"""convext.inspection.features: descriptors against their libraries, a CNN against convext train.

The data are scikit-learn's digits, few and offline. Accuracies are those of one fixed split.
"""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="features need the extra convext[features]")
skimage = pytest.importorskip("skimage", reason="features need the extra convext[features]")
pytest.importorskip("sklearn", reason="features need the extra convext[features]")
pytest.importorskip("lightning", reason="training needs the extra convext[train]")

from convext.__main__ import main  # noqa: E402
from convext.inspection import features  # noqa: E402
from convext.mnist.data import Split, load_digits  # noqa: E402

ROOT = Path(__file__).parents[1]
LENGTHS = {"raw pixels": 784, "HOG": 1296, "SIFT": 1152, "ORB": 2304}


@pytest.fixture(scope="module")
def digits():
    """Digits, a hundred to learn from and sixty to validate with."""
    data = load_digits()
    train, valid = data.train, data.valid
    return Split(train.images[:100], train.labels[:100]), Split(
        valid.images[:60], valid.labels[:60]
    )


@pytest.fixture(scope="module")
def comparison(digits):
    return features.compare(*digits, epochs=3, batch_size=16)


def oblong(number=2):
    """Images higher than wide."""
    return torch.rand(number, 1, 40, 24, generator=torch.Generator().manual_seed(1))


# ---- descriptors ----


@pytest.mark.parametrize("name", list(LENGTHS))
def test_a_vector_for_each_image_the_same_each_time_and_alone(digits, name):
    describe = features.DESCRIPTORS[name]
    images = digits[0].images[:5]
    found = describe(images)
    assert found.shape == (5, LENGTHS[name])
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert len(np.unique(found, axis=0)) == 5
    assert np.array_equal(found, describe(images))
    assert np.array_equal(found[3:4], describe(images[3:4]))
    assert describe(images[:0]).shape == (0, LENGTHS[name])


def test_raw_pixels_are_the_pixels():
    images = oblong()
    assert np.array_equal(features.raw_pixels(images), images.flatten(1).numpy())


def test_hog_is_scikit_images():
    images = oblong()
    direct = [
        skimage.feature.hog(
            image[0].numpy(), orientations=9, pixels_per_cell=(4, 4), cells_per_block=(2, 2)
        )
        for image in images
    ]
    assert np.array_equal(features.hog(images), np.array(direct, dtype=np.float32))


@pytest.mark.parametrize(
    ("across", "numbers"),
    # An angle at the boundary of two histogram bins may fall into either.
    [("x", {0, 8}), ("y", {4})],
)
def test_hog_cells_point_where_brightness_changes(across, numbers):
    image = torch.zeros(1, 16, 24)
    image[:, :, 12:] = 1
    if across == "y":
        image = image.transpose(1, 2).contiguous()
    cells = features.hog_cells(image)
    rows, columns = (4, 6) if across == "x" else (6, 4)
    assert cells.shape == (rows, columns, 9)
    seen = cells if across == "x" else cells.transpose(1, 0, 2)
    assert {int(n) for n in np.unique(seen[:, 2:4].argmax(-1))} <= numbers
    assert np.all(seen[:, 2:4].max(-1) > 0.1)
    assert np.all(seen[:, [0, 5]] == 0)


def test_hog_cells_are_means_over_the_blocks_of_a_cell():
    image = oblong()[0]
    blocks = features.hog(image[None]).reshape(9, 5, 2, 2, 9)
    cells = features.hog_cells(image)
    assert np.allclose(cells[0, 0], blocks[0, 0, 0, 0])
    inner = blocks[2, 3, 1, 1] + blocks[3, 3, 0, 1] + blocks[2, 4, 1, 0] + blocks[3, 4, 0, 0]
    assert np.allclose(cells[3, 4], inner / 4)


def test_points_are_the_middles_of_nine_rectangles():
    xs, ys = np.array(features.grid_points(30, 15)).T.reshape(2, 3, 3)
    assert ys[:, 0].tolist() == [4.5, 14.5, 24.5]
    assert xs[0].tolist() == [2.0, 7.0, 12.0]


def test_sift_is_opencvs_with_a_window_of_16_pixels():
    images = oblong()
    points = [cv2.KeyPoint(x, y, 8 / 3, 0) for x, y in features.grid_points(40, 24)]
    direct = [
        cv2.SIFT_create(sigma=0.8).compute((image[0] * 255).round().byte().numpy(), points)[1]
        for image in images
    ]
    assert np.array_equal(features.sift(images), np.array(direct).reshape(2, -1) / 512)


@pytest.mark.parametrize(
    ("x", "y", "seen"),
    # Points lie at 13.5, 41.5 and 69.5; histograms reach 8 pixels, and 2 more with less weight.
    [(20, 12, [0]), (28, 28, []), (41, 41, [4]), (12, 63, [6]), (63, 76, [8])],
)
def test_sift_reads_what_is_near_a_point(x, y, seen):
    image = torch.zeros(1, 1, 84, 84)
    image[..., y, x] = 1
    described = features.sift(image).reshape(9, 128)
    assert described.any(1).nonzero()[0].tolist() == seen


def test_orb_is_opencvs_with_a_black_border():
    images = oblong()
    points = [cv2.KeyPoint(x + 31, y + 31, 31, 0) for x, y in features.grid_points(80, 48)]
    direct = []
    for image in images:
        large = cv2.resize((image[0] * 255).round().byte().numpy(), None, fx=2, fy=2)
        framed = np.pad(large, 31)
        kept, bits = cv2.ORB_create(nlevels=1, edgeThreshold=0).compute(framed, points)
        assert [point.pt for point in kept] == [point.pt for point in points]
        direct.append(np.unpackbits(bits))
    assert np.array_equal(features.orb(images), np.array(direct))


@pytest.mark.parametrize("name", list(LENGTHS))
def test_bad_images_are_named(name):
    describe = features.DESCRIPTORS[name]
    with pytest.raises(ValueError, match=r"images must be of shape .*got \(2, 3, 28, 28\)"):
        describe(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"images must be float32, got torch.uint8"):
        describe(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\], got 0 to 255"):
        describe(torch.tensor([0.0, 255.0]).repeat(1, 1, 28, 14))
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
        describe(torch.full((1, 1, 28, 28), math.nan))


def test_hog_needs_a_block():
    with pytest.raises(ValueError, match=r"at least 8x8 pixels, got \(1, 1, 28, 7\)"):
        features.hog(torch.zeros(1, 1, 28, 7))


# ---- Hough ----


@pytest.mark.parametrize(
    ("start", "end", "angle", "distance"),
    # (row, column); the normal's angle by hand
    [
        ((3, 11), (28, 11), 0, 11),
        ((6, 2), (6, 18), 90, 6),
        ((2, 2), (18, 18), -45, 0),
        ((20, 2), (4, 18), 45, 22 / math.sqrt(2)),
    ],
)
def test_hough_finds_a_line_that_was_drawn(start, end, angle, distance):
    image = torch.zeros(1, 32, 20)
    image[0][skimage.draw.line(*start, *end)] = 1
    (line, *_) = features.hough_demo(image).lines
    degrees = math.degrees(line.angle)
    if angle == 90 and degrees < 0:  # the same line, turned about
        degrees, line = degrees + 180, features.HoughLine(line.angle, -line.distance, line.votes)
    assert abs(degrees - angle) <= 2
    assert abs(line.distance - distance) <= 1
    assert line.votes >= 14


def test_votes_are_the_points_on_a_line_to_the_nearest_pixel():
    image = torch.zeros(1, 24, 31)
    image[0][skimage.draw.line(2, 20, 21, 9)] = 1
    image[0][skimage.draw.line(2, 3, 4, 25)] = 1
    hough = features.hough_demo(image)
    rows, columns = hough.points.nonzero()
    assert len(rows) > 20
    for angle, votes in list(zip(hough.angles, hough.votes.T, strict=True))[5::17]:
        exact = columns * np.cos(angle) + rows * np.sin(angle)
        # Votes within half a pixel, a tie to either side.
        for distance, count in zip(hough.distances, votes, strict=True):
            away = np.abs(exact - distance)
            assert (away < 0.499).sum() <= count <= (away < 0.501).sum()
    assert np.all(hough.votes.sum(0) == len(rows))


def test_hough_lists_its_lines_best_first_and_no_more_than_asked():
    image = torch.zeros(1, 28, 28)
    image[0, 5, 3:25] = 1
    image[0, 5:22, 14] = 1
    hough = features.hough_demo(image)
    assert [line.votes for line in hough.lines] == sorted(
        (line.votes for line in hough.lines), reverse=True
    )
    assert len(hough.lines) == 2
    assert len(features.hough_demo(image, most=1).lines) == 1
    assert len(str(hough).splitlines()) == 3


def test_hough_on_an_empty_image_finds_nothing():
    hough = features.hough_demo(torch.zeros(1, 28, 28))
    assert hough.lines == ()
    assert not hough.votes.any()


def test_bad_arguments_of_hough():
    with pytest.raises(ValueError, match=r"image must be .*got \(28, 28\)"):
        features.hough_demo(torch.zeros(28, 28))
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        features.hough_demo(torch.zeros(1, 28, 28), most=0)


# ---- the comparison ----


def test_rows(comparison):
    assert [row.name for row in comparison.rows] == [*LENGTHS, "CNN"]
    assert [row.length for row in comparison.rows] == [*LENGTHS.values(), None]
    learned = [10 * (length + 1) for length in LENGTHS.values()]
    assert [row.parameters for row in comparison.rows] == [*learned, 30_522]
    assert (comparison.train_images, comparison.valid_images) == (100, 60)
    for row in comparison.rows:
        assert row.fit_seconds > 0
        each = row.describe_seconds / 160 + row.predict_seconds / 60
        assert row.seconds_per_image == pytest.approx(each)


def test_accuracy_is_that_of_scikit_learns_classifier(digits, comparison):
    from sklearn.svm import LinearSVC

    train, valid = digits
    svm = LinearSVC(C=0.1, dual=False).fit(features.hog(train.images), train.labels)
    accuracy = svm.score(features.hog(valid.images), valid.labels)
    assert comparison.rows[1].accuracy == pytest.approx(accuracy, abs=1e-12)


def test_every_kind_learns(comparison):
    # A hundred images are few, and chance would be 10%.
    for row in comparison.rows[:-1]:
        assert 0.8 < row.accuracy < 1, row.name
    assert comparison.rows[-1].accuracy > 0.3


def test_the_cnn_is_that_of_convext_train(tmp_path):
    from convext.mnist.data import load_digits
    from convext.mnist.run_folder import load_checkpoint
    from convext.mnist.train import Options, train

    train(Options(data="digits", epochs=2, seed=3, threads=1, device="cpu", out=tmp_path))
    state = load_checkpoint(tmp_path)[1]["state_dict"]
    before = torch.get_rng_state()
    model = features.train_cnn(load_digits().train, epochs=2, batch_size=64, lr=0.06, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name


def test_a_descriptor_of_ones_own(digits):
    def rows_and_columns(images):
        return torch.cat([images.mean(2), images.mean(3)], -1).flatten(1).numpy()

    found = features.compare(*digits, {"profile": rows_and_columns}, epochs=1)
    assert [(row.name, row.length) for row in found.rows] == [("profile", 56), ("CNN", None)]


def test_threads_are_put_back(digits):
    torch.set_num_threads(1)
    before = cv2.getNumThreads()
    seen = []

    def describe(images):
        seen.append((torch.get_num_threads(), cv2.getNumThreads()))
        return features.raw_pixels(images)

    features.compare(*digits, {"raw": describe}, epochs=1, threads=2)
    assert set(seen) == {(2, 2)}
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0.0}, "C must be above 0, got 0.0"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"threads": -1}, "threads must be above 0, got -1"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    ],
)
def test_bad_options_are_named_before_any_work(digits, options, message):
    def describe(images):
        raise AssertionError("work began")

    with pytest.raises(ValueError, match=re.escape(message)):
        features.compare(*digits, {"none": describe}, **options)


def test_bad_splits_are_named(digits):
    small = Split(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"valid\.images must be .*got \(4, 1, 8, 8\)"):
        features.compare(digits[0], small)
    empty = Split(digits[0].images[:0], digits[0].labels[:0])
    with pytest.raises(ValueError, match=r"train\.images must be .*got \(0, 1, 28, 28\)"):
        features.compare(empty, digits[1])
    same = Split(digits[0].images, torch.zeros(100, dtype=torch.int64))
    with pytest.raises(ValueError, match="train must hold images of at least two classes"):
        features.compare(same, digits[1])


def test_plain_text_and_rich_show_the_same_numbers(comparison):
    from rich.console import Console

    text = str(comparison)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(comparison)
    for shown in (text, capture.get()):
        assert "100 images to learn from, 60 to validate with" in shown
        assert "C = 0.1; CNN for 3 epochs of batches of 16" in " ".join(shown.split())
        for row in comparison.rows:
            assert f"{row.accuracy:.2%}" in shown
            assert f"{row.parameters:,}" in shown
    assert max(map(len, text.splitlines()[3:])) <= 80


def test_the_picture_shows_the_measured_numbers(comparison):
    figure = comparison.plot()
    left, right = figure.axes[-2:]
    assert [label.get_text() for label in left.get_yticklabels()] == [*LENGTHS, "CNN"]
    wrong = [bar.get_width() for bar in left.patches]
    assert wrong == pytest.approx([100 * (1 - row.accuracy) for row in comparison.rows])
    times = [bar.get_width() for bar in right.patches]
    assert times == pytest.approx([row.seconds_per_image * 1e6 for row in comparison.rows])
    assert len(comparison.examples) == 4


def test_the_picture_of_what_has_none_of_the_examples(comparison):
    bare = replace(comparison, examples=comparison.examples[:0])
    assert [axes.get_xlabel() for axes in bare.plot().axes if axes.axison][:-2] == []


# ---- the command ----


def test_command(capsys, tmp_path):
    picture = tmp_path / "features.png"
    args = ["features", "--data", "digits", "--train-images", "60", "--epochs", "1"]
    assert main([*args, "--out", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "data  digits: the first 60 of 1,438 images to learn from"
    assert lines[1] == "60 images to learn from, 359 to validate with"
    names = ["raw pixels", "HOG", "SIFT", "ORB", "CNN"]
    assert [next(n for n in names if line.startswith(n)) for line in lines[-6:-1]] == names
    assert lines[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train-images", "0"], "--train-images must be at least 1, got 0"),
        (["--train-images", "1439"], "--train-images must be at most 1438, of digits, got 1439"),
        (["--train-images", "1"], "--train-images must take in at least two classes, got 1"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--data-dir", "."], "digits are read from scikit-learn"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    assert main(["features", "--data", "digits", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convext features: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "extra"), [("cv2", "features"), ("skimage", "features"), ("lightning", "train")]
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert main(["features", "--data", "digits"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"convext features: needs {module}: pip install 'convext[{extra}]'\n"


def test_a_missing_library_is_found_before_any_work(monkeypatch, digits):
    def describe(images):
        raise AssertionError("work began")

    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError, match="lightning"):
        features.compare(*digits, {"none": describe})


def test_inspection_is_imported_without_the_extra():
    code = (
        "import sys; import convext.inspection.features\n"
        "print([m for m in ('cv2', 'skimage', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
