"""One epoch of `convext train` on our layers and on stock ones, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from convext.bench.results import NCHW, ON_GPU, Row
from convext.errors import UserError


def measure_epoch(threads: int, rounds: int) -> Row:
    """The seconds that an epoch spends in its steps (train_seconds), in turn."""
    times: dict[str, list[float]] = {"torch": [], "convext": []}
    for _ in range(rounds):
        for layers, found in times.items():
            found.append(_train_seconds(layers, threads))
    return Row(
        group="epoch",
        part="",
        layer="`convext train`, 1 epoch",
        what="train_seconds",
        dtype="float32",
        threads=threads,
        torch={NCHW: times["torch"]},
        ours={"auto": {NCHW: times["convext"]}},
    )


def _train_seconds(layers: str, threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "convext", "train", "--epochs", "1", "--data", "mnist"]
        # Nothing but the steps: what watches them would take its time from both.
        command += ["--layers", layers, "--stats", "off", "--no-report", "--out", str(run)]
        command += (
            ["--device", "cuda"]
            if threads == ON_GPU
            else ["--device", "cpu", "--threads", str(threads)]
        )
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"epoch: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
        return json.loads((run / "metrics.json").read_text())["train_seconds"]
