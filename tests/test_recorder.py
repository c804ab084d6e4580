"""The Recorder: what it is told, what a run tells it, its files and its charts."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convext.lab.charts import smoothed
from convext.lab.recorder import COLUMNS, Recorder

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

from convext.lab.activation_stats import ActivationStats
from convext.lab.callbacks import RecordRun
from convext.mnist import callbacks
from convext.mnist.data import load_digits
from convext.mnist.learner import Learner
from convext.mnist.loader import BatchLoader
from convext.mnist.model import lesson_cnn
from convext.mnist.train import Options, train

STEPS = 11  # of an epoch of digits in batches of 128


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains on digits; options as `Options` has them. Returns the run's folder."""

    def run(**options):
        defaults = {"data": "digits", "layers": "torch", "threads": 1, "batch_size": 128}
        folder = tmp_path_factory.mktemp("runs") / "run"
        if "resume" not in options:
            defaults["out"] = folder
        threads = torch.get_num_threads()
        try:
            train(Options(**({} if "resume" in options else defaults), **options))
        finally:
            torch.set_num_threads(threads)
        return options.get("resume", folder)

    return run


@pytest.fixture(scope="module")
def straight(run):
    """A run of two epochs."""
    return run(epochs=2, lr=0.02, seed=4)


def told(losses, **options):
    """A recorder of these losses, in epochs of four steps."""
    recorder = Recorder()
    for step, loss in enumerate(losses):
        row = {"step": step, "epoch": 1 + step // 4, "lr": 0.1 / (1 + step), "momentum": 0.9}
        recorder.batch(loss=torch.as_tensor(loss), **{**row, **options})
    return recorder


# ---- what it is told ----


def test_it_gives_back_what_it_was_told():
    recorder = told([2.5, 1.5], lr=0.25)
    assert recorder.batches == {
        "step": [0, 1],
        "epoch": [1, 1],
        "loss": [2.5, 1.5],
        "lr": [0.25, 0.25],
        "momentum": [0.9, 0.9],
    }
    recorder.batch(step=2, epoch=2, loss=torch.tensor(0.5), lr=0.0, momentum=0.8)
    assert recorder.batches["loss"] == [2.5, 1.5, 0.5]
    assert len(recorder) == 3


def test_a_loss_that_changes_afterwards_is_kept_as_it_was():
    recorder, loss = Recorder(), torch.tensor(1.0, requires_grad=True)
    recorder.batch(step=0, epoch=1, loss=loss, lr=0.1, momentum=0.9)
    with torch.no_grad():
        loss += 1
    assert recorder.batches["loss"] == [1.0]


def test_going_on_from_a_state():
    recorder = told([3.0, 2.0])
    recorder.epochs = [{"epoch": 1, "accuracy": 0.5}]
    state = recorder.state_dict()
    recorder.batch(step=2, epoch=1, loss=torch.tensor(1.0), lr=0.1, momentum=0.9)
    other = told([9.0])
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert len(other) == 2
    assert other.epochs == [{"epoch": 1, "accuracy": 0.5}]


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.75), 0.75),
        (lambda p: torch.optim.AdamW(p, lr=0.5, betas=(0.85, 0.99)), 0.85),
        (lambda p: torch.optim.Adagrad(p, lr=0.5), math.nan),
    ],
)
def test_momentum_of_any_optimiser(make, momentum):
    watch = RecordRun(Recorder())
    watch.on_before_optimizer_step(None, None, make([torch.nn.Parameter(torch.ones(1))]))
    trainer = SimpleNamespace(global_step=1, current_epoch=0)
    watch.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
    assert watch.recorder.batches["lr"] == [0.5]
    assert watch.recorder.batches["momentum"] == pytest.approx([momentum], nan_ok=True)


# ---- files ----


def test_files_leave_what_is_not_finite_empty(tmp_path):
    recorder = told([2.0, math.inf, math.nan, 0.1])
    recorder.epochs = [{"epoch": 1, "valid_loss": math.nan}]
    recorder.save(tmp_path)
    text = (tmp_path / "record.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["batches"]["loss"] == [2.0, None, None, pytest.approx(0.1)]
    rows = list(csv.reader((tmp_path / "record.csv").open()))
    assert rows[0] == list(COLUMNS)
    assert [row[2] for row in rows[1:]] == ["2.0", "", "", str(float(np.float32(0.1)))]
    loaded = Recorder.load(tmp_path)
    exact = [2.0, math.nan, math.nan, float(np.float32(0.1))]
    assert loaded.batches["loss"] == pytest.approx(exact, nan_ok=True)
    assert math.isnan(loaded.epochs[0]["valid_loss"])
    loaded.save(tmp_path)
    assert (tmp_path / "record.json").read_text() == text


def test_a_file_that_is_no_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recorder.load(tmp_path)
    for text in ("hello", "[]", "{}", '{"batches": {"step": []}, "epochs": []}', "null"):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError):  # noqa: PT011  (the parser's own, or the next)
            Recorder.load(tmp_path)
    with pytest.raises(ValueError, match=r"record\.json: not written by Recorder.save"):
        Recorder.load(tmp_path)


# ---- a run's record ----


def test_a_runs_record_is_that_of_the_same_steps_by_hand(straight):
    torch.manual_seed(4)
    train = load_digits().train
    model = lesson_cnn("torch", normalize=train.statistics())
    batches = BatchLoader(train.images, train.labels, 128, seed=4, drop_last=True)
    configured = Learner(model, 0.02, total_steps=2 * STEPS).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    expected = {name: [] for name in COLUMNS}
    for epoch in (0, 1):
        batches.epoch = epoch
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            group = optimizer.param_groups[0]
            row = (len(expected["step"]), epoch + 1, loss.item(), group["lr"], group["betas"][0])
            for name, value in zip(COLUMNS, row, strict=True):
                expected[name].append(value)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    record = Recorder.load(straight)
    assert len(record) == 2 * STEPS
    for name in COLUMNS:
        assert record.batches[name] == pytest.approx(expected[name], rel=1e-4), name
    metrics = json.loads((straight / "metrics.json").read_text())
    assert record.epochs == metrics["history"]
    rows = list(csv.DictReader((straight / "record.csv").open()))
    for name in COLUMNS:
        assert [float(row[name]) for row in rows] == record.batches[name]


def test_a_run_that_was_stopped_and_went_on_has_the_record_of_one_that_was_not(
    run, straight, monkeypatch
):
    def stop(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 5:
            raise callbacks.InterruptError

    folder = straight.parent / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochTable, "on_train_batch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(
                Options(
                    data="digits", layers="torch", threads=1, batch_size=128, epochs=2, lr=0.02,
                    seed=4, out=folder,
                )
            )  # fmt: skip
    run(resume=folder)
    one, other = Recorder.load(straight), Recorder.load(folder)
    assert one.batches == other.batches
    for record in (one, other):
        for row in record.epochs:
            del row["train_seconds"]
    assert one.epochs == other.epochs
    one, other = (ActivationStats.load(path / "activations.npz") for path in (straight, folder))
    assert one.batches == other.batches == 2 * STEPS
    for layer in ("relu1", "relu2", "relu3", "relu4"):
        for name, value in vars(one.layer(layer)).items():
            np.testing.assert_array_equal(value, getattr(other.layer(layer), name))


def test_a_runs_statistics_are_those_of_its_first_batch(straight):
    torch.manual_seed(4)
    train = load_digits().train
    model = lesson_cnn("torch", normalize=train.statistics())
    images, _ = next(iter(BatchLoader(train.images, train.labels, 128, seed=4, drop_last=True)))
    found = ActivationStats.load(straight / "activations.npz").layer("relu4")
    output = model[:12](images)
    assert found.mean[0] == pytest.approx(output.mean().item(), rel=1e-5)
    assert found.std[0] == pytest.approx(output.std().item(), rel=1e-5)
    np.testing.assert_array_equal(found.batches, range(2 * STEPS))


def test_less_is_collected_where_less_is_asked_for(run):
    numbers = run(epochs=1, stats="numbers")
    assert ActivationStats.load(numbers / "activations.npz").layer(0).histograms is None
    off = run(epochs=1, stats="off")
    assert not (off / "activations.npz").exists()
    assert len(Recorder.load(off)) == STEPS


def test_a_run_that_diverges_has_a_record_and_charts(run):
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    folder = run(epochs=1, lr=1e30)
    record = Recorder.load(folder)
    assert not np.isfinite(record.batches["loss"]).all()
    record.plot_loss().draw_without_rendering()
    stats = ActivationStats.load(folder / "activations.npz")
    assert np.isnan(stats.layer("relu4").mean[-1])
    stats.color_dim("relu4").draw_without_rendering()
    stats.plot_layer_stats("relu4").draw_without_rendering()


# ---- charts ----


def test_plot_sched(straight):
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    record = Recorder.load(straight)
    rate, momentum = record.plot_sched().axes
    assert [axes.get_title() for axes in (rate, momentum)] == ["learning rate", "momentum"]
    for axes, name in ((rate, "lr"), (momentum, "momentum")):
        assert axes.get_xlabel() == "batch"
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), range(2 * STEPS))
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), record.batches[name])


def test_plot_loss():
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    recorder = told([4.0, 2.0, 1.0, 0.5, 8.0, math.inf, math.nan, 0.25])
    recorder.epochs = [{"epoch": 1, "valid_loss": 0.75}, {"epoch": 2, "valid_loss": math.nan}]
    (axes,) = recorder.plot_loss().axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(
        lines["batch"].get_ydata(), [4, 2, 1, 0.5, 8, math.nan, math.nan, 0.25]
    )
    np.testing.assert_array_equal(lines["validation"].get_xdata(), [3, 7])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), [0.75, math.nan])
    assert set(lines["no longer finite"].get_xdata()) == {5}
    recorder = told([1.0, 2.0] + [math.nan] * 8)
    assert recorder.plot_loss().axes[0].get_xlim()[1] > 9
    assert np.isnan(lines["batches, smoothed"].get_ydata()[5:7]).all()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("batch", "loss", "log")


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan], [math.nan] * 3])
def test_charts_of_little(losses):
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    recorder = told(losses)
    recorder.plot_loss().draw_without_rendering()
    recorder.plot_sched().draw_without_rendering()


def test_smoothed_is_pandas_mean_with_exponential_weights():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    losses = np.random.default_rng(0).lognormal(size=200)
    losses[[0, 17, 18]] = math.nan
    means = pandas.Series(losses).ewm(alpha=0.02, adjust=True, ignore_na=True).mean().to_numpy()
    np.testing.assert_allclose(smoothed(losses), np.where(np.isnan(losses), losses, means))
