"""A run's folder: last.ckpt to go on from, and what there is to read and to see of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from convext.errors import UserError
from convext.mnist.settings import Settings

CHECKPOINT = "last.ckpt"
METRICS = "metrics.json"
ACTIVATIONS = "activations.npz"
RECORD = "record.json"
BATCHES = "record.csv"
REPORT = "report.html"


def new_run_folder(out: str | Path | None, name: str) -> Path:
    """Makes the folder of a new run: `out`, or else the first free runs/NAME-001, -002, ...

    Raises:
        UserError: `out` holds a run already, or the folder can't be made or written to.
    """
    if out is not None:
        folder = Path(out).expanduser()
        if (folder / CHECKPOINT).exists():
            raise UserError(f"--out: {folder} holds a run; go on with it by --resume {folder}")
        return writable_folder(folder)
    for number in range(1, 1_000_000):
        folder = Path("runs") / f"{name}-{number:03d}"
        if not folder.exists():
            return writable_folder(folder)
    raise UserError("runs: no free name is left; give one with --out")


def writable_folder(folder: Path, option: str = "--out") -> Path:
    """Makes the folder if need be, and makes sure now, not after the work, of writing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: {folder}: {error.strerror or error}") from error
    return folder


def load_checkpoint(path: str | Path, option: str = "--resume") -> tuple[Path, dict]:
    """Reads a checkpoint, given itself or its run's folder.

    Only tensors and plain values are unpickled, so that a checkpoint can run no code.

    Returns:
        The checkpoint's path and what it holds.

    Raises:
        UserError: there is none, or the file is not one that `convext train` wrote.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / CHECKPOINT
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        advice = "; a run that ended before its first step has none: start it again"
        advice = advice if option == "--resume" and path.parent.is_dir() else ""
        raise UserError(f"{option}: {path}: no such checkpoint{advice}") from error
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles raise whatever they please
        raise UserError(f"{option}: {path}: not a checkpoint, or a broken one") from error
    if not isinstance(checkpoint, dict) or "convext" not in checkpoint:
        raise UserError(f"{option}: {path}: not a checkpoint of convext train")
    return path, checkpoint


def read_metrics(folder: Path, option: str) -> dict:
    """Reads a run's metrics.json.

    Raises:
        UserError: it is not there, or none that `convext train` wrote.
    """
    path = folder / METRICS
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{option}: {path}: not JSON") from error
    if not isinstance(metrics, dict) or not metrics.get("history"):
        raise UserError(f"{option}: {path}: not written by convext train")
    return metrics


def load_trained(path: str | Path, option: str) -> tuple[Settings, nn.Sequential]:
    """Reads the network of a run, given its folder or checkpoint.

    Returns:
        What the run was, and its network with the weights trained so far, in evaluation mode.

    Raises:
        UserError: as `load_checkpoint`.
    """
    path, checkpoint = load_checkpoint(path, option)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(prefix)
    }
    try:
        settings = Settings(**checkpoint["convext"])
        # "auto", since an algorithm that was named may be one of another device.
        model = replace(settings, algorithm="auto").make_model()
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{option}: {path}: not a run of this version of convext") from error
    return settings, model.eval()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name to write to; at the end of the block that file takes the place of `path`.

    Whenever the process dies, `path` is the old file or the new one, whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing to."""
    for name in (CHECKPOINT, METRICS, ACTIVATIONS, RECORD, BATCHES, REPORT):
        for path in folder.glob(f".{name}.*"):
            if path.suffix[1:].isdecimal():
                path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes the file, whole or not at all. A number that is not finite becomes null."""
    with replacing(path) as temporary:
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity, which a diverged loss is."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
