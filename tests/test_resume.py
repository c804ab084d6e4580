"""A run that is killed, at whatever moment, goes on to the bits that it would have come to.

Runs are processes of `convext train` on digits, and SIGKILL ends them. They are forked from a
process that has torch and Lightning imported already, for which each would take seconds.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

import lightning.pytorch as pl

from convext.errors import UserError
from convext.mnist import callbacks, run_folder
from convext.mnist.data import load_digits
from convext.mnist.learner import Learner
from convext.mnist.settings import make_settings
from convext.mnist.train import Options, train

if os.name != "posix":
    pytest.skip("sends SIGKILL, which only POSIX systems have", allow_module_level=True)

ROOT = Path(__file__).parents[1]
LAYERS = ["convext", "torch"]
EPOCHS, STEPS = 3, 22  # steps of each epoch
RUN = ("--data=digits", "--threads=1", f"--epochs={EPOCHS}")


pytestmark = pytest.mark.usefixtures("restore_threads")


# ---- processes, and when they die ----


def command(log, fatal, args):
    """What a process does: `convext train`, which kills itself at the fatal moment, if any."""
    from convext.__main__ import main

    if fatal:
        FATAL[fatal]()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            sys.exit(main(["train", *args, "--no-report"]))


def started(folder, *args, fatal=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convext.mnist.train", "sklearn.datasets"])
    log = folder.with_name(f"{folder.name}.log")
    process = context.Process(target=command, args=(log, fatal, args), daemon=True)
    process.start()
    return process


def finished(folder, *args, fatal=None):
    """Runs the process to its end: the exit status, negative for a signal."""
    process = started(folder, *args, fatal=fatal)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_the_first_checkpoint():
    callbacks.SaveRun.on_train_start = die


def die_before_the_first_step():
    Learner.training_step = die


def die_in_validation():
    """Of the second epoch, amid its batches."""
    step = Learner.validation_step

    def validation_step(self, *args):
        step(self, *args)
        if self.current_epoch == 1:
            die()

    Learner.validation_step = validation_step


def die_as_the_checkpoint_is_written():
    """The one of the second epoch's end, of which half is there."""
    save = pl.Trainer.save_checkpoint

    def save_half(self, path, *args):
        save(self, path, *args)
        if len(self.lightning_module.history) == 2:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    pl.Trainer.save_checkpoint = save_half


def die_before_the_figures(epoch):
    """When the epoch's checkpoint is there, and metrics.json and the others are not yet."""
    write = run_folder.write_json

    def write_json(path, content):
        if len(content["history"]) == epoch:
            die()
        write(path, content)

    import convext.mnist.train

    convext.mnist.train.write_json = write_json


FATAL = {
    "before the first checkpoint": die_before_the_first_checkpoint,
    "before the first step": die_before_the_first_step,
    "in validation": die_in_validation,
    "as the checkpoint is written": die_as_the_checkpoint_is_written,
    "before the first figures": lambda: die_before_the_figures(1),
    "before the last figures": lambda: die_before_the_figures(EPOCHS),
}


# ---- what is compared ----


def checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def step_of(folder):
    """Steps done in the checkpoint; -1 for none."""
    try:
        return checkpoint(folder)["global_step"]
    except FileNotFoundError:
        return -1


def assert_same(one, other, where="checkpoint"):
    """Equal bit for bit but for times, and for how often was to be saved."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"train_seconds", "seconds", "save_every"}:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert one == other or (one != one and other != other), where


def assert_same_run(folder, expected):
    """All of the checkpoint (weights, optimiser, schedule, loops, history), and all files."""
    assert_same(checkpoint(folder), checkpoint(expected))
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}
    for name in ("record.json", "metrics.json"):
        content, wanted = (json.loads((run / name).read_text()) for run in (folder, expected))
        assert_same(content, wanted, name)
    assert (folder / "record.csv").read_bytes() == (expected / "record.csv").read_bytes()
    arrays, wanted = (np.load(run / "activations.npz") for run in (folder, expected))
    assert set(arrays) == set(wanted)
    for name in wanted:
        assert arrays[name].tobytes() == wanted[name].tobytes(), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Uninterrupted runs, by kind of layers."""
    folder = tmp_path_factory.mktemp("straight")
    runs = {}

    def straight(layers):
        if layers not in runs:
            assert (
                finished(folder / layers, *RUN, f"--layers={layers}", f"--out={folder / layers}")
                == 0
            )
            runs[layers] = folder / layers
        return runs[layers]

    return straight


# ---- killed ----


@pytest.mark.parametrize("layers", ["convext", pytest.param("torch", marks=pytest.mark.slow)])
def test_killed_at_random_moments(straight, tmp_path, layers):
    """Five times in a row: as soon as there is a checkpoint, then wherever."""
    draw, run = random.Random(layers), tmp_path / "run"
    kills = [0, *sorted(draw.randrange(1, (EPOCHS - 1) * STEPS) for _ in range(4))]
    args = (*RUN, f"--layers={layers}", "--save-every=0.05", f"--out={run}")
    killed = 0
    for step in kills:
        process = started(run, *args)
        while step_of(run) < step and process.is_alive():
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        args = ("--resume", str(run))
    assert killed >= 3, "the runs were over too soon to be killed"
    assert finished(run, *args) == 0
    assert_same_run(run, straight(layers))


@pytest.mark.parametrize("fatal", [f for f in FATAL if f != "before the first checkpoint"])
def test_killed_at_a_bad_moment(straight, tmp_path, fatal):
    run = tmp_path / "run"
    args = (*RUN, "--layers=torch", "--save-every=0.02", f"--out={run}")
    assert finished(run, *args, fatal=fatal) == -signal.SIGKILL
    half_written = [p.name for p in run.iterdir() if p.name.startswith(".last.ckpt.")]
    assert len(half_written) == (fatal == "as the checkpoint is written")
    assert finished(run, "--resume", str(run)) == 0
    assert_same_run(run, straight("torch"))


def test_killed_before_there_was_anything(straight, tmp_path):
    run = tmp_path / "run"
    args = (*RUN, "--layers=torch", f"--out={run}")
    assert finished(run, *args, fatal="before the first checkpoint") == -signal.SIGKILL
    assert finished(run, "--resume", str(run)) == 2
    log = (tmp_path / "run.log").read_text()
    assert log.endswith(
        f"convext train: --resume: {run}/last.ckpt: no such checkpoint; a run that ended before "
        "its first step has none: start it again\n"
    )
    assert finished(run, *args) == 0
    assert_same_run(run, straight("torch"))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    for name in (".last.ckpt.123", ".record.csv.4", ".last.ckpt.mine", ".metrics.json"):
        (tmp_path / name).touch()
    run_folder.remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".last.ckpt.mine", ".metrics.json"}


# ---- Ctrl-C ----


@pytest.mark.parametrize("layers", LAYERS)
def test_ctrl_c_keeps_the_step_just_done(straight, tmp_path, monkeypatch, layers):
    """In the midst of step 31 the signal comes: it is finished, and saved."""
    step, run = Learner.training_step, tmp_path / "run"

    def training_step(self, batch, number):
        if self.global_step == 30:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    options = {"data": "digits", "threads": 1, "epochs": EPOCHS, "layers": layers}
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(Options(report=False, **options, out=run))
    assert str(caught.value) == (
        f"Interrupted: {run}/last.ckpt holds 31 of 66 steps, 1 of 3 epochs; "
        f"go on with --resume {run}"
    )
    assert step_of(run) == 31
    assert finished(run, "--resume", str(run)) == 0
    assert "resumed   after 31 steps" in (tmp_path / "run.log").read_text()
    assert_same_run(run, straight(layers))


@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_ctrl_c_at_an_epochs_end_keeps_the_epoch(straight, tmp_path, monkeypatch, hook):
    original, run = getattr(Learner, hook), tmp_path / "run"

    def interrupted(self, *args):
        if self.global_step == 2 * STEPS - (hook == "training_step"):
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, hook, interrupted)
        with pytest.raises(KeyboardInterrupt, match="holds 44 of 66 steps, 2 of 3 epochs;"):
            train(
                Options(
                    report=False, data="digits", threads=1, epochs=EPOCHS, layers="torch", out=run
                )
            )
    assert len(json.loads((run / "metrics.json").read_text())["history"]) == 2
    train(Options(report=False, resume=run))
    assert_same_run(run, straight("torch"))


def test_a_second_ctrl_c_does_not_wait():
    with callbacks.interruptible() as interrupt:
        interrupt.awaited = True
        signal.raise_signal(signal.SIGINT)
        assert interrupt.came
        with pytest.raises(callbacks.InterruptError):
            signal.raise_signal(signal.SIGINT)


# ---- going on otherwise ----


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was interrupted in its second epoch."""
    step = Learner.training_step

    def training_step(self, batch, number):
        if self.global_step == STEPS + 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(
                Options(
                    data="digits", threads=1, epochs=EPOCHS, layers="torch", out=tmp_path / "run"
                )
            )
    return tmp_path / "run"


def test_a_run_goes_on_in_another_folder(straight, stopped, tmp_path):
    before = (stopped / "last.ckpt").read_bytes()
    train(Options(report=False, resume=stopped / "last.ckpt", out=tmp_path / "other"))
    assert_same_run(tmp_path / "other", straight("torch"))
    assert (stopped / "last.ckpt").read_bytes() == before


def test_new_settings_are_kept_from_the_first_step_on(stopped):
    assert (
        finished(stopped, "--resume", str(stopped), "--epochs=5", fatal="before the first step") < 0
    )
    assert checkpoint(stopped)["convext"]["epochs"] == 5
    assert checkpoint(stopped)["lr_schedulers"][0]["total_steps"] == 5 * STEPS
    assert step_of(stopped) == STEPS + 5


def test_a_run_cannot_end_before_the_epoch_that_it_is_in(stopped):
    with pytest.raises(UserError, match=re.escape("--epochs 1: the run to resume is in epoch 2")):
        train(Options(report=False, resume=stopped, epochs=1))


def test_the_folder_with_the_data_need_not_be_named_again(stopped, tmp_path, monkeypatch):
    """Here: it is looked for where the run had it, though that is gone."""
    content = checkpoint(stopped)
    monkeypatch.chdir(tmp_path)
    options = Options(data_dir="here")
    settings = make_settings(options, load_digits(), None)
    assert settings.data_dir == str(tmp_path / "here")
    content["convext"].update(data="mnist", data_dir=settings.data_dir)
    torch.save(content, stopped / "last.ckpt")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/here: no such folder")):
        train(Options(report=False, resume=stopped))
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        train(Options(report=False, resume=stopped, data_dir="elsewhere"))


def test_a_checkpoint_of_before_there_were_any_within_epochs(tmp_path):
    run = tmp_path / "run"
    train(Options(report=False, data="digits", threads=1, epochs=1, layers="torch", out=run))
    content = checkpoint(run)
    del content["epoch_under_way"]
    for name in ("save_every", "data_dir"):
        del content["convext"][name]
    torch.save(content, run / "last.ckpt")
    train(Options(report=False, resume=run, epochs=2))
    assert [row["epoch"] for row in checkpoint(run)["history"]] == [1, 2]


def test_seconds_of_before_are_counted_and_saving_is_not(stopped, monkeypatch):
    before = checkpoint(stopped)["epoch_under_way"]["seconds"]
    assert before > 0
    save = callbacks.SaveRun._save

    def slow(self, trainer):
        time.sleep(0.2)
        save(self, trainer)

    monkeypatch.setattr(callbacks.SaveRun, "_save", slow)
    started = time.perf_counter()
    train(Options(report=False, resume=stopped, epochs=2, save_every=0))
    passed = time.perf_counter() - started
    seconds = checkpoint(stopped)["history"][1]["train_seconds"]
    assert before < seconds < before + passed - (STEPS - 6) * 0.2


# ---- two processes ----


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
def test_two_processes_save_together_and_go_on(tmp_path, layers):
    """Killed when the leader has saved within an epoch; what they sum up differs in each."""
    args = ["--data=digits", "--threads=2", "--devices=2", "--epochs=2", "--no-report"]
    args.append(f"--layers={layers}")

    def convext(*more):
        return subprocess.Popen(
            [sys.executable, "-m", "convext", "train", *args, *more],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    run = tmp_path / "run"
    assert convext(f"--out={tmp_path / 'straight'}").wait(120) == 0
    process = convext(f"--out={run}", "--save-every=0")
    while step_of(run) < 10 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait(120) == -signal.SIGKILL
    step = step_of(run)
    assert step % callbacks.SaveRun.ASK == 0 or step % STEPS == 0
    args = ["--resume", str(run), "--no-report"]
    assert convext().wait(120) == 0
    assert_same_run(run, tmp_path / "straight")
