"""Several processes that train together: batch norm over all of them, DDP, FSDP2, `--devices`.

What two processes do is in distributed_worker.py; they are started once for all its checks.
"""

import copy
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import distributed_worker
import pytest
import torch
import torch.distributed as dist
from torch import nn

import convext
from convext.__main__ import main

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")

from rich.console import Console

from convext.errors import ProcessError, UserError
from convext.mnist import processes
from convext.mnist.data import load_digits
from convext.mnist.model import lesson_cnn
from convext.mnist.train import Options, train

ROOT = Path(__file__).parents[1]
RUN_FILES = {"last.ckpt", "metrics.json", "record.json", "record.csv", "activations.npz"}
DEADLINE = 2 * distributed_worker.SECONDS + 20


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """For each process, what went wrong in which check."""
    folder = tmp_path_factory.mktemp("checks")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=distributed_worker.run, args=(rank, str(folder)), daemon=True)
        for rank in range(distributed_worker.PROCESSES)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * len(processes), "a process died, or hung where stderr says"
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(processes))]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(distributed_worker.CHECKS))
def test_two_processes(failures, name):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"process {rank}:\n{failed[name]}"


# ---- the layer in one process ----


def test_outside_a_process_group_the_layer_is_batch_norm():
    layer, single = convext.SyncBatchNorm2d(4), convext.BatchNorm2d(4)
    single.load_state_dict(layer.state_dict())
    input = torch.randn(2, 4, 3, 5)
    for _ in range(2):
        assert torch.equal(layer(input), single(input))
        layer.eval(), single.eval()
    for name, value in single.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)


def test_conversion_keeps_everything_but_the_class():
    model = nn.Sequential(
        convext.Conv2d(1, 2, 3), convext.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(3)).eval()
    )
    before = dict(model.named_modules()), {**model.state_dict(keep_vars=True)}
    assert convext.SyncBatchNorm2d.convert_sync_batchnorm(model) is model
    kinds = [type(model[0]), type(model[1]), type(model[2][0])]
    assert kinds == [convext.Conv2d, convext.SyncBatchNorm2d, convext.SyncBatchNorm2d]
    assert model[1].training
    assert not model[2][0].training
    for name, module in model.named_modules():
        assert module is before[0][name]
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[1][name]
    convext.restore_layers(model)
    assert type(model[1]) is type(model[2][0]) is nn.SyncBatchNorm
    input = torch.randn(2, 1, 5, 6)
    assert model[:2](input).shape == (2, 2, 3, 4)


def test_conversion_warns_of_what_it_leaves():
    class Other(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(Other(3)), nn.SyncBatchNorm(4))
    with pytest.warns(UserWarning, match=r"not synchronised: 0 \(BatchNorm1d\), 1\.0 \(Other\)$"):
        convext.SyncBatchNorm2d.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_layer_is_copied_and_pickled():
    layer = convext.SyncBatchNorm2d(4, momentum=None)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is convext.SyncBatchNorm2d
        assert twin.process_group is None
        assert str(twin) == str(layer)


# ---- processes that are started, and how they end ----


def lead(size, task, error=None):
    """What the leader of these tests does."""
    with processes.started(size, task) as world:
        assert world.share("start") == "start"
        if error:
            raise error
        dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "task", "message"),
    [
        (3, distributed_worker.fail, "process 1 of 3 failed:\n.*ValueError: the disk is on fire$"),
        (2, distributed_worker.die, "process 1 of 2 was ended by SIGKILL$"),
        (2, distributed_worker.EndsWhenRead(), "process 1 of 2 was ended with status 3$"),
    ],
    ids=["fail", "die", "end early"],
)
def test_a_process_that_fails_ends_all_with_its_message(capfd, size, task, message):
    with pytest.raises(ProcessError, match=f"(?s)^{message}"):
        lead(size, task)
    assert multiprocessing.active_children() == []
    assert not dist.is_initialized()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_error_of_the_leader_ends_all_and_stays_what_it_is():
    with pytest.raises(OSError, match="no space left"):
        lead(2, distributed_worker.wait_for_ever, OSError("no space left"))
    assert multiprocessing.active_children() == []
    assert not dist.is_initialized()


def test_one_process_needs_no_group():
    with processes.started(1, distributed_worker.fail) as world:
        assert (world.leads, world.size) == (True, 1)
        assert world.share("start") == "start"
        assert not dist.is_initialized()


# ---- convext train with several ----

# A small rate, and few steps: AdamW lets differences of rounding grow quickly.
RUN_FILES = {"last.ckpt", "metrics.json", "record.json", "record.csv", "activations.npz"}
FEW_STEPS = {"data": "digits", "batch_size": 360, "lr": 1e-3, "threads": 2}


pytestmark = pytest.mark.usefixtures("restore_threads")


def arguments(**options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def command(*args):
    """A process of this source tree, in a session of its own as a terminal would make it."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def is_empty(session):
    """Whether no process of it is left, give or take the moments that an exit takes."""
    for _ in range(100):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_near_run(folder, expected, **changed):
    found, wanted = checkpoint(folder), checkpoint(expected)
    assert found["convext"] == {**wanted["convext"], **changed}
    assert list(found["state_dict"]) == list(wanted["state_dict"])
    for name, value in wanted["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    assert len(found["history"]) == len(wanted["history"])
    for ours, theirs in zip(found["history"], wanted["history"], strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=2 / 359)
        for name in ("valid_loss", "train_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the same run by one process and by two, and what the latter printed."""
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    train(Options(**FEW_STEPS, epochs=1, out=folder / "one", report=False))
    train(Options(**FEW_STEPS, epochs=1, devices=2, out=folder / "two"), Console(file=printed))
    return folder, printed.getvalue()


@pytest.mark.slow
def test_two_processes_train_as_one_does(runs):
    folder, printed = runs
    assert "processes 2, each with 180 images of every batch; batch norm over all" in printed
    assert printed.count("epoch    accuracy") == 1
    assert {p.name for p in (folder / "two").iterdir()} == {*RUN_FILES, "report.html"}
    assert_near_run(folder / "two", folder / "one", devices=2)


@pytest.mark.slow
def test_a_run_of_two_goes_on_as_one(runs, tmp_path):
    folder, _ = runs
    for name in ("one", "two"):
        options = Options(resume=folder / name, epochs=2, devices=1, out=tmp_path / name)
        train(replace(options, report=False))
    assert_near_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_torchruns_processes_come_to_the_same_bits(runs, tmp_path):
    options = arguments(**FEW_STEPS, epochs=1, out=tmp_path / "run")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    started = command(*torchrun, "-m", "convext", "train", "--no-report", *options)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 0, err
    assert out.count("epoch    accuracy") == 1
    found, wanted = checkpoint(tmp_path / "run"), checkpoint(runs[0] / "two")
    assert found["convext"] == wanted["convext"]
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] == wanted["history"][0]["accuracy"]
    assert metrics["devices"] == 2


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of stock layers that Ctrl-C ended after an epoch or more: its folder and process."""
    if os.name != "posix":
        pytest.skip("sends SIGINT, which only POSIX systems have")
    folder = tmp_path_factory.mktemp("interrupted")
    script = folder / "convext"  # what pip makes of the entry point
    script.write_text(
        "import sys\nfrom convext.__main__ import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    options = {**FEW_STEPS, "layers": "torch", "lr": 0.06, "devices": 2, "epochs": 9999}
    started = command(script, "train", *arguments(**options, out=folder / "run"))
    for line in started.stdout:  # until the first epoch's line
        if line.split()[:1] == ["1"]:
            break
    os.killpg(started.pid, signal.SIGINT)  # a terminal sends it to all of them
    return folder / "run", started, started.communicate(timeout=60)[1]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(interrupted):
    run, process, err = interrupted
    assert process.returncode == 130
    assert err.startswith(f"convext train: Interrupted: {run}/last.ckpt holds ")
    assert err.count("\n") == 1
    assert is_empty(process.pid)
    assert {p.name for p in run.iterdir()} == RUN_FILES


@pytest.mark.slow
def test_stock_layers_are_validated_and_saved_as_the_first_process_has_them(tmp_path):
    options = {**FEW_STEPS, "layers": "torch", "lr": 0.06, "devices": 2, "epochs": 1}
    train(Options(**options, out=tmp_path / "run"))
    saved = checkpoint(tmp_path / "run")
    model = lesson_cnn("torch", normalize=((0.0,), (1.0,)))  # which the weights replace
    weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
    model.load_state_dict(weights)
    valid = load_digits().valid
    with torch.no_grad():
        scores = model.eval()(valid.images)
    correct = (scores.argmax(1) == valid.labels).sum().item()
    assert saved["history"][-1]["accuracy"] == correct / len(valid)
    loss = nn.functional.cross_entropy(scores, valid.labels).item()
    assert saved["history"][-1]["valid_loss"] == pytest.approx(loss, rel=1e-5)


# ---- under torchrun ----


@pytest.fixture
def torchrun(monkeypatch):
    """As if torchrun had started this process: the first, and with no other."""
    variables = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**variables, **ranks}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_torchrun_decides_how_many_processes_there_are(torchrun, tmp_path):
    with pytest.raises(UserError, match=r"^--devices 2: torchrun started 1 process$"):
        train(Options(**FEW_STEPS, devices=2))
    metrics = train(Options(**FEW_STEPS, epochs=1, out=tmp_path / "run", report=False))
    assert metrics["devices"] == 1
    assert not dist.is_initialized()


def test_of_torchruns_processes_the_first_speaks(torchrun, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--fly"])
    assert "unrecognized arguments: --fly" in capsys.readouterr().err
    torchrun.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--fly"])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")
