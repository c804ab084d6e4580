"""The learning-rate finder: the sweep against one by hand, and that it leaves nothing behind."""

import copy
import math
import signal
import tempfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

from convext.__main__ import main
from convext.lab.lr_finder import LrFinding, find_lr
from convext.mnist.learner import Learner
from convext.mnist.loader import BatchLoader
from convext.mnist.model import lesson_cnn

pytestmark = pytest.mark.usefixtures("restore_threads")


def task(layers="torch"):
    """A learner, and three batches of noise an epoch."""
    torch.manual_seed(2)
    images, labels = torch.rand(48, 1, 28, 28), torch.randint(10, (48,))
    learner = Learner(lesson_cnn(layers), lr=0.06, total_steps=20)
    return learner, BatchLoader(images, labels, 16, seed=3, drop_last=True)


# ---- the sweep ----


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_the_sweep_is_that_of_the_same_steps_by_hand(layers):
    found = find_lr(*task(layers), min_rate=1e-5, max_rate=0.1, steps=20)
    assert len(found.rates) == len(found.losses) == 20
    assert found.rates[0] == 1e-5
    # The Tuner leaves out the second rate of 20 that grow alike, and ends at the last.
    np.testing.assert_allclose(found.rates[1:], 1e-5 * 1e4 ** (np.arange(2, 21) / 20))
    learner, batches = task(layers)
    optimizer = learner.configure_optimizers()["optimizer"]
    losses = []
    for step, rate in enumerate(found.rates):
        if step % 3 == 0:
            batches.epoch = step // 3
            epoch = iter(batches)
        images, labels = next(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(learner.model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(found.losses, losses, rtol=1e-3)


def test_it_stops_when_the_loss_has_diverged():
    found = find_lr(*task(), min_rate=1e-3, max_rate=1e6, steps=60)
    assert 5 < len(found.rates) < 60
    assert found.losses[-1] > 4 * found.losses[0]


def test_it_leaves_nothing_behind(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    learner, batches = task()
    before = copy.deepcopy(learner.state_dict())
    place = batches.state_dict()
    random = torch.get_rng_state()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    find_lr(learner, batches, steps=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert batches.state_dict() == place
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert learner.history == []
    assert learner._trainer is None
    assert "on_train_batch_end" not in vars(learner)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert list((tmp_path / "temporary").iterdir()) == list((tmp_path / "here").iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_a_keyboard_interrupt(monkeypatch, capfd):
    learner, batches = task()
    monkeypatch.setattr(
        Learner, "on_train_batch_start", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        find_lr(learner, batches, steps=8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rate": 0}, "min_rate and max_rate must rise and be above 0, got 0 and 10.0"),
        ({"min_rate": 1, "max_rate": 1}, "must rise and be above 0, got 1 and 1"),
        ({"max_rate": math.inf}, "must rise and be above 0, got 1e-06 and inf"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        find_lr(*task(), **options)


# ---- what it finds ----


def finding(shape, steps=400):
    """A sweep over 1e-6 to 10 whose loss is a function of the rate's decimal logarithm."""
    exponents = np.linspace(-6, 1, steps)
    return LrFinding(tuple(10.0**exponents), tuple(shape(exponents).tolist()))


def test_the_suggestion_is_a_tenth_of_the_rate_of_lowest_loss():
    found = finding(lambda x: 2 + np.where(x < -2, -np.tanh(2 * (x + 3)), 3 * (x + 2)))
    smooth = found.smoothed
    assert found.lowest == found.rates[smooth.argmin()]
    assert 10**-2.1 < found.lowest < 10**-1  # smoothing lags behind
    assert found.suggestion == found.lowest / 10
    assert 10**-3.5 < found.steepest < 10**-2
    slopes = np.diff(smooth) / np.diff(np.log(found.rates))
    assert found.steepest == pytest.approx(found.rates[slopes.argmin()], rel=0.05)
    assert f"suggestion     {found.suggestion:.2g}" in str(found)
    assert "400 steps, rates from 1e-06 to 10" in str(found)


def test_losses_that_are_not_finite_are_left_out():
    found = finding(lambda x: np.where(x < 0, 3 - x / 10, np.nan))
    assert found.lowest == max(rate for rate in found.rates if rate < 1)
    assert np.isnan(found.smoothed[-1])
    assert found.steepest < 1


@pytest.mark.parametrize("shape", [lambda x: x + 10, lambda x: np.full(400, np.nan)])
def test_no_suggestion_where_the_loss_never_falls(shape):
    found = finding(shape)
    assert (found.lowest, found.steepest, found.suggestion) == (None, None, None)
    assert "no suggestion: the loss never fell" in str(found)


def test_plot():
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    found = finding(lambda x: 2 - np.tanh(x + 3) + np.where(x < 0, 0, 9 * x))
    (axes,) = found.plot().axes
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log",
        "learning rate",
        "loss",
    )
    lines = {line.get_label().partition(":")[0]: line for line in axes.lines}
    assert set(lines) == {
        *("batch", "batches, smoothed"),
        *("suggestion", "steepest fall", "lowest loss"),
    }
    np.testing.assert_array_equal(lines["batches, smoothed"].get_ydata(), found.smoothed)
    assert set(lines["suggestion"].get_xdata()) == {found.suggestion}
    finding(lambda x: np.full(400, np.nan)).plot().draw_without_rendering()


# ---- the command ----


def test_command(capfd, tmp_path):
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    picture = tmp_path / "lr.png"
    options = ["--data", "digits", "--threads", "1", "--steps", "40", "--out", str(picture)]
    assert main(["lr-find", *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("batches of 64, 3")
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        "lowest loss",
        "steepest fall",
        "suggestion",
        str(picture),
    ]
    assert 1e-3 < float(lines[3].split()[1]) < 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--seed", "-1"], "--seed must be from 0 to"),
        (["--data", "digits", "--data-dir", "x"], "digits are read from scikit-learn"),
        (["--data", "digits", "--steps", "2", "--out", "x.png/y.docx"], "--out: "),
    ],
)
def test_command_mistakes(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(["lr-find", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("convext lr-find: ")
    assert message in err
    assert err.count("\n") == 1
