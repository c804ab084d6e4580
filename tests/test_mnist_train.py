"""The training run: what it starts from, what it writes, and that it goes on where it stopped.

Runs are on digits with one thread, where an epoch takes a fraction of a second; the accuracy
of MNIST itself is a slow test.
"""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

from convext.errors import UserError  # noqa: E402
from convext.mnist import callbacks  # noqa: E402
from convext.mnist.data import Split, load_digits  # noqa: E402
from convext.mnist.learner import Learner  # noqa: E402
from convext.mnist.model import lesson_cnn  # noqa: E402
from convext.mnist.train import Options, train  # noqa: E402

LAYERS = ["convext", "torch"]
RUN_FILES = {"last.ckpt", "metrics.json", "record.json", "record.csv", "activations.npz"}


pytestmark = pytest.mark.usefixtures("restore_threads")


@pytest.fixture
def run(tmp_path):
    """Trains on digits into tmp_path / name; options as `Options` has them."""

    def run(name, **options):
        defaults = {"data": "digits", "threads": 1, "layers": "torch", "out": tmp_path / name}
        defaults["report"] = False
        train(Options(**{**defaults, **options}))
        return tmp_path / name

    return run


def checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def without_times(history):
    return [{k: v for k, v in epoch.items() if k != "train_seconds"} for epoch in history]


def assert_same_run(one, other):
    """The same bits: weights, buffers, the optimiser's memory, the schedule, the history."""
    first, second = checkpoint(one), checkpoint(other)
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = [c["optimizer_states"][0] for c in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, states[1]["state"][number][name]), name
    assert first["lr_schedulers"] == second["lr_schedulers"]
    assert without_times(first["history"]) == without_times(second["history"])


# ---- the network ----


def test_both_kinds_start_from_the_same_bits():
    models = []
    for layers in LAYERS:
        torch.manual_seed(7)
        models.append(lesson_cnn(layers).state_dict())
    assert list(models[0]) == list(models[1])
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize("layers", LAYERS)
def test_the_network_maps_images_to_ten_scores(layers):
    model = lesson_cnn(layers)
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    shapes = [(*m.kernel_size, *m.stride) for m in model if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(5, 5, 2, 2)] + [(3, 3, 2, 2)] * 4


def test_the_network_refuses_unknown_layers():
    with pytest.raises(ValueError, match="'jax'"):
        lesson_cnn("jax")
    with pytest.raises(ValueError, match="algorithm='im2col'"):
        lesson_cnn("torch", algorithm="im2col")


def test_the_network_normalises_as_its_training_images_are():
    images = torch.rand(20, 2, 28, 28) * torch.tensor([1.0, 0.2]).view(2, 1, 1)
    images[:, 1] = 0.5  # a channel that is the same all over
    mean, std = Split(images, torch.zeros(20).long()).statistics()
    array = images.double().numpy()
    assert mean == pytest.approx(array.mean((0, 2, 3)))
    assert std == pytest.approx(array.std((0, 2, 3)), abs=1e-12)
    model = lesson_cnn("torch", in_channels=2, normalize=(mean, std))
    found = model.normalize(images)
    torch.testing.assert_close(found[:, 0], (images[:, 0] - mean[0]) / std[0])
    assert not found[:, 1].any()
    plain = lesson_cnn("torch", in_channels=2)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("normalize")}
    )
    torch.testing.assert_close(model.eval()(images), plain.eval()(found))


def test_statistics_are_the_same_bits_for_any_number_of_threads():
    images = load_digits().train.images
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(Split(images, torch.zeros(len(images))).statistics())
    assert found[0] == found[1] == found[2]


def test_normalising_draws_no_random_number():
    for layers in LAYERS:
        torch.manual_seed(3)
        plain = lesson_cnn(layers)
        torch.manual_seed(3)
        normalising = lesson_cnn(layers, normalize=((0.1,), (0.3,)))
        assert torch.equal(plain.conv5.weight, normalising.conv5.weight)


# ---- the schedule ----


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 117])
def test_schedule_is_fastais_1cycle(steps):
    configured = Learner(lesson_cnn("torch"), lr=0.06, total_steps=steps).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates, momenta = [], []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if len(rates) < steps:
            schedule.step()
    assert rates[-1] == pytest.approx(0.06 / 100_000)
    assert all(0.85 <= momentum <= 0.95 for momentum in momenta)
    if steps == 117:
        assert rates[0] == pytest.approx(0.06 / 25)
        assert max(rates) == pytest.approx(0.06, rel=1e-3)
        assert rates.index(max(rates)) in (28, 29)  # a quarter of the way
        assert min(momenta) == momenta[rates.index(max(rates))] == pytest.approx(0.85, rel=1e-3)


# ---- what a run writes and shows ----


@pytest.mark.parametrize("layers", LAYERS)
def test_metrics(run, layers):
    folder = run("run", layers=layers, epochs=2, batch_size=128, lr=0.02, seed=3)
    found = metrics(folder)
    assert {p.name for p in folder.iterdir()} == RUN_FILES
    expected = {
        "data": "digits",
        "layers": layers,
        "parameters": 30_522,
        "seed": 3,
        "epochs": 2,
        "batch_size": 128,
        "lr": 0.02,
        "threads": 1,
        "algorithm": "auto",
        "device": "cpu",
        "devices": 1,
    }
    assert expected.items() <= found.items()
    assert set(found["versions"]) == {"convext", "torch", "lightning", "python"}
    assert found["versions"]["torch"] == torch.__version__
    assert [epoch["epoch"] for epoch in found["history"]] == [1, 2]
    last = found["history"][-1]
    assert (found["accuracy"], found["valid_loss"]) == (last["accuracy"], last["valid_loss"])
    assert found["train_seconds"] == sum(epoch["train_seconds"] for epoch in found["history"]) > 0


def test_accuracy_is_what_the_saved_weights_achieve(run):
    folder = run("run", epochs=2)
    model = lesson_cnn("torch", normalize=((0.0,), (1.0,)))  # which the weights replace
    weights = {k.removeprefix("model."): v for k, v in checkpoint(folder)["state_dict"].items()}
    model.load_state_dict(weights)
    valid = load_digits().valid
    with torch.no_grad():
        scores = model.eval()(valid.images)
    correct = (scores.argmax(1) == valid.labels).sum().item()
    assert metrics(folder)["accuracy"] == correct / len(valid)
    loss = torch.nn.functional.cross_entropy(scores, valid.labels).item()
    assert metrics(folder)["valid_loss"] == pytest.approx(loss, rel=1e-5)
    found = load_digits().train.images.double()
    assert weights["normalize.mean"].item() == pytest.approx(found.mean().item())
    assert weights["normalize.std"].item() == pytest.approx(found.std(correction=0).item())


def test_output_in_order_and_nothing_of_lightnings(run, tmp_path, capfd):
    run("run", epochs=2)
    out, err = capfd.readouterr()
    assert err == ""
    patterns = [
        r"^data +digits: 1,438 images to train on, 359 to validate with",
        r"^layers +torch",
        r"^training +2 epochs of 22 batches of 64, learning rate up to 0.06, seed 0, 1 thread$",
        r"^conv2 +Conv2d +1 x 16 x 7 x 7 +1,152 +16 +1,168 +56,448 +9 x 9$",
        r"^epoch +accuracy +valid loss +train loss +time$",
        r"^ +1( +\d+\.\d+%)( +\d+\.\d{4}){2} +\d+\.\d\d s$",
        r"^ +2( +\d+\.\d+%)( +\d+\.\d{4}){2} +\d+\.\d\d s$",
        rf"^{re.escape(str(tmp_path))}/run/last.ckpt",
        rf"^{re.escape(str(tmp_path))}/run/metrics.json",
    ]
    places = [re.search(pattern, out, re.MULTILINE) for pattern in patterns]
    assert all(places), patterns[places.index(None)]
    assert [p.start() for p in places] == sorted(p.start() for p in places)
    for foreign in ("lightning", "Trainer", "GPU", "Tip", "\x1b", "%|"):
        assert foreign not in out


def test_a_loss_that_diverged_is_still_json(run):
    folder = run("run", epochs=1, lr=1e30)
    text = (folder / "metrics.json").read_text()
    assert "NaN" not in text
    assert metrics(folder)["valid_loss"] is None


def test_the_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        train(Options(data="digits", layers="torch", epochs=1, threads=1, report=False))
        assert metrics(Path(f"runs/digits-torch-00{number}"))["epochs"] == 1


# ---- the same again, and going on ----


@pytest.mark.parametrize("layers", LAYERS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, layers):
    one, again = run("a", layers=layers, epochs=1), run("b", layers=layers, epochs=1)
    assert_same_run(one, again)
    other = run("c", layers=layers, epochs=1, seed=1)
    name = "model.conv1.weight"
    assert not torch.equal(
        checkpoint(one)["state_dict"][name], checkpoint(other)["state_dict"][name]
    )


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kept", [1, 2])
def test_resuming_gives_the_bits_of_the_run_that_was_not_stopped(run, monkeypatch, layers, kept):
    """Stopped by an error, after which the last checkpoint is of an epoch's end."""
    straight = run("straight", layers=layers, epochs=3)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == kept and batch_idx == 3:
            raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochTable, "on_train_batch_end", on_train_batch_end)
        with pytest.raises(OSError, match="no space left"):
            run("stopped", layers=layers, epochs=3, save_every=math.inf)
    stopped = straight.parent / "stopped"
    assert len(metrics(stopped)["history"]) == len(checkpoint(stopped)["history"]) == kept
    torch.manual_seed(99)  # whatever happened in between
    train(Options(resume=stopped, report=False))
    assert_same_run(straight, stopped)
    assert metrics(stopped).keys() == metrics(straight).keys()


def test_interrupted_before_anything_was_kept(run, monkeypatch, tmp_path):
    def on_fit_start(self, trainer, module):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(callbacks.EpochTable, "on_fit_start", on_fit_start)
    with pytest.raises(KeyboardInterrupt, match="before the first step: nothing was kept"):
        run("run", epochs=2)
    assert list((tmp_path / "run").iterdir()) == []


def test_going_on_beyond_the_end_spreads_the_schedule_over_all_epochs(run, tmp_path):
    first = run("run", epochs=1)
    train(Options(resume=first / "last.ckpt", epochs=3, out=tmp_path / "longer", report=False))
    longer, straight = checkpoint(tmp_path / "longer"), checkpoint(run("straight", epochs=3))
    assert len(longer["history"]) == 3
    for key in ("total_steps", "last_epoch", "_last_lr", "_schedule_phases"):
        assert longer["lr_schedulers"][0][key] == straight["lr_schedulers"][0][key], key
    for one, other in zip(
        longer["optimizer_states"][0]["param_groups"],
        straight["optimizer_states"][0]["param_groups"],
        strict=True,
    ):
        assert one == other
    assert len(checkpoint(first)["history"]) == 1  # the first run is left as it was


def test_resuming_a_finished_run_writes_its_metrics_again(run, capsys):
    folder = run("run", epochs=1)
    before = metrics(folder)
    (folder / "metrics.json").unlink()
    train(Options(resume=folder, report=False))
    assert metrics(folder) == before
    assert "Nothing left to train" in capsys.readouterr().out


def test_resume_refuses_what_would_make_it_another_run(run, tmp_path):
    folder = run("run", epochs=2)
    for options, message in [
        ({"lr": 0.1}, "--lr 0.1: the run to resume has 0.06"),
        ({"batch_size": 32}, "--batch-size 32: the run to resume has 64"),
        ({"layers": "convext"}, "--layers convext: the run to resume has torch"),
        ({"data": "mnist"}, "--data mnist: the run to resume has digits"),
        ({"epochs": 1}, "--epochs 1: the run to resume has trained 2 already"),
        ({"devices": 3}, "--batch-size must be a multiple of the number of processes, 3, got 64"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            train(Options(resume=folder, **options))


@pytest.mark.parametrize("damage", ["absent", "text", "truncated", "foreign"])
def test_resume_refuses_a_file_that_is_no_checkpoint(run, tmp_path, damage):
    path = tmp_path / "last.ckpt"
    if damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes((run("run", epochs=1) / "last.ckpt").read_bytes()[:-1000])
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"--resume: .*last\.ckpt: (no such|not a) checkpoint"):
        train(Options(resume=tmp_path))


# ---- MNIST ----


def mnist_folder():
    """Where MNIST lies on this machine: $CONVEXT_DATA, or the shared folder beside the clone."""
    beside = Path(__file__).parents[2] / "shared" / "mnist"
    return os.environ.get("CONVEXT_DATA") or (beside if beside.is_dir() else None)


@pytest.mark.slow
@pytest.mark.skipif(mnist_folder() is None, reason="MNIST is not on this machine: set CONVEXT_DATA")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_epoch_of_mnist_reaches_98_percent_with_either_layers(tmp_path, seed):
    accuracy = {}
    for layers in LAYERS:
        folder = tmp_path / layers
        train(
            Options(
                epochs=1,
                batch_size=512,
                lr=0.06,
                seed=seed,
                data="mnist",
                data_dir=mnist_folder(),
                layers=layers,
                out=folder,
                report=False,
            )
        )
        accuracy[layers] = metrics(folder)["accuracy"]
    assert accuracy["convext"] >= 0.98
    assert abs(accuracy["convext"] - accuracy["torch"]) <= 0.005
