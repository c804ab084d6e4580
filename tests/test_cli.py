"""The command line: what it says and with which exit status, for good use and bad."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convext.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
OPTIONS = (
    *("--epochs", "--batch-size", "--lr", "--seed", "--data", "--data-dir", "--layers"),
    *("--algorithm", "--device", "--devices", "--threads", "--no-report", "--out", "--resume"),
    *("--image-size", "--augment", "--save-every", "--stats"),
)


def convext(*args, **options):
    """A `python -m convext` process of this source tree."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "convext", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_help(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "train" in out
    if args[0] == "train":
        for option in OPTIONS:
            assert f"  {option} " in out


def test_help_needs_none_of_the_extras():
    code = (
        "import sys; from convext.__main__ import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('lightning', 'rich', 'pooch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_a_help_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert len(COMMANDS) >= 1
    assert "train the lesson's CNN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--fly"], "unrecognized arguments: --fly"),
        (["train", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["train", "--lr", "-1"], "--lr must be above 0 and finite, got -1.0"),
        (["train", "--lr", "0"], "--lr must be above 0 and finite, got 0.0"),
        (["train", "--lr", "nan"], "--lr must be above 0 and finite, got nan"),
        (["train", "--lr", "inf"], "--lr must be above 0 and finite, got inf"),
        (["train", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["train", "--seed", "-1"], "--seed must be from 0 to"),
        (["train", "--threads", "0"], "--threads must be from 1 to 1024, got 0"),
        (["train", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["train", "--devices", "0"], "--devices must be from 1 to 1024, got 0"),
        (["train", "--devices", "two"], "--devices: invalid int value: 'two'"),
        (
            ["train", "--devices", "3", "--batch-size", "64"],
            "--batch-size must be a multiple of the number of processes, 3, got 64",
        ),
        (
            ["train", "--data", "digits", "--devices", "3"],
            "--batch-size must be a multiple of the number of processes, 3, got 64",
        ),
        (["train", "--data", "cifar"], "--data 'cifar': no such folder, and none of mnist, digits"),
        (["train", "--image-size", "28x"], "--image-size: must be sizes like 28 or 24x32, got"),
        (["train", "--image-size", "33"], "--image-size must be from 1 to 32 high and wide"),
        (["train", "--data", "digits", "--colour"], "--colour is for a folder of pictures"),
        (["train", "--save-every", "-1"], "--save-every must be 0 or more, got -1.0"),
        (["train", "--save-every", "nan"], "--save-every must be 0 or more, got nan"),
        (["train", "--layers", "jax"], "--layers: invalid choice: 'jax'"),
        (["train", "--algorithm", "magic"], "--algorithm must be one of auto, "),
        (["train", "--layers", "torch", "--algorithm", "direct"], "needs --layers convext"),
        (["train", "--data-dir", "/no/such"], "--data-dir: /no/such: no such folder"),
        (["train", "--resume", "/no/such"], "--resume: /no/such: no such checkpoint"),
        (["train", "--data", "digits", "--data-dir", "."], "digits are read from scikit-learn"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    try:
        status = main(args)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("convext")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
def test_a_device_that_is_not_there_is_one_line_and_status_2(capsys):
    assert main(["train", "--device", "cuda", "--data", "digits"]) == 2
    assert capsys.readouterr().err == "convext train: --device cuda: torch finds no GPU\n"


def test_a_corrupt_file_is_one_line_and_status_2(capsys, tmp_path):
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{part}-ubyte").write_bytes(b"<html>not found</html>")
    assert main(["train", "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"convext train: {tmp_path}/train-images-idx3-ubyte: not an IDX file")
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    args = ["train", "--data", "digits", "--layers", "torch"]
    assert main([*args, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "--out: " in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_written_over(capsys, tmp_path):
    (tmp_path / "last.ckpt").write_text("a week's work")
    args = ["train", "--data", "digits", "--layers", "torch"]
    assert main([*args, "--out", str(tmp_path)]) == 2
    assert f"go on with it by --resume {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "last.ckpt").read_text() == "a week's work"


@pytest.mark.parametrize(
    ("module", "extra"), [("lightning", "train"), ("rich", "train"), ("sklearn", "digits")]
)
def test_a_missing_extra_is_named(module, extra):
    code = (
        f"import sys; sys.modules[{module!r}] = None  # as if it were not installed\n"
        "from convext.__main__ import main\n"
        "sys.exit(main(['train', '--data', 'digits', '--layers', 'torch']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert f"pip install 'convext[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_train_then_resume_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    args = ["train", "--data", "digits", "--layers", "torch", "--threads", 1, "--epochs", 1]
    out, err = convext(*args, "--no-report", "--out", run).communicate()
    assert err == ""
    assert f"{run}/last.ckpt" in out
    out, err = convext("train", "--resume", run, "--epochs", 2, "--no-report").communicate()
    assert err == ""
    assert len(json.loads((run / "metrics.json").read_text())["history"]) == 2


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT, which only POSIX systems have")
def test_ctrl_c_is_status_130_and_says_what_was_kept(tmp_path):
    run = tmp_path / "run"
    args = ["train", "--data", "digits", "--layers", "torch", "--threads", 1, "--epochs", 9999]
    process = convext(*args, "--out", run)
    for line in process.stdout:  # until the first epoch's line
        if line.split()[:1] == ["1"]:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith(f"convext train: Interrupted: {run}/last.ckpt holds ")
    assert err.endswith(f"of 9999 epochs; go on with --resume {run}\n")
    assert err.count("\n") == 1
    assert (run / "last.ckpt").exists()
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]  # nothing half written
