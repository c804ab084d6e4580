"""What a run's optimiser was told and what came of it, batch by batch."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convext.mnist.run_folder import BATCHES, RECORD, replacing, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("step", "epoch", "loss", "lr", "momentum")


class Recorder:
    """The record of a training run, a row for each optimiser step and one for each epoch.

    Losses may be tensors on a GPU: they are read when someone looks, all at once, since a read at
    each step would make the device wait for Python. A loss that diverged is kept as it is, NaN or
    infinity; in files, which know neither, it is left empty.

    Attributes:
        epochs: one dict per finished epoch, of any figures (accuracy, valid_loss, ...).
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._columns: dict[str, list] = {name: [] for name in COLUMNS}
        self._unread: list[Tensor] = []

    def batch(self, *, step: int, epoch: int, loss: Tensor, lr: float, momentum: float) -> None:
        """Notes an optimiser step: steps count from 0, epochs from 1.

        lr and momentum are those that the step was made with; momentum is SGD's, or Adam's beta1,
        or NaN of an optimiser that has none.
        """
        for name, value in (("step", step), ("epoch", epoch), ("lr", lr), ("momentum", momentum)):
            self._columns[name].append(value)
        # A copy, on the device: whose tensor this is may go on adding to it.
        self._unread.append(loss.detach().clone())

    @property
    def batches(self) -> dict[str, list]:
        """The columns step, epoch, loss, lr and momentum, a number for each optimiser step.

        steps count from 0, epochs from 1.
        """
        if self._unread:
            self._columns["loss"] += torch.stack(self._unread).double().tolist()
            self._unread = []
        return self._columns

    def __len__(self) -> int:
        """Optimiser steps noted."""
        return len(self._columns["step"])

    def plot_sched(self) -> Figure:
        """Learning rate and momentum over the batches."""
        from convext.lab.charts import plot_sched

        return plot_sched(self.batches)

    def plot_loss(self) -> Figure:
        """Training loss of each batch, its running mean, and the validation loss of each epoch."""
        from convext.lab.charts import plot_loss

        return plot_loss(self.batches, self.epochs)

    # ---- keeping it ----

    def state_dict(self) -> dict:
        """The record so far, as plain values; a checkpoint holds it."""
        return {
            "batches": {name: list(column) for name, column in self.batches.items()},
            "epochs": [dict(row) for row in self.epochs],
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self._columns = {name: list(state["batches"][name]) for name in COLUMNS}
        self._unread = []
        self.epochs = [dict(row) for row in state["epochs"]]

    def save(self, folder: str | Path) -> None:
        """Writes record.json, which holds all of it, and record.csv, which holds the batches."""
        folder = Path(folder)
        write_json(folder / RECORD, self.state_dict())
        with replacing(folder / BATCHES) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in zip(*(self.batches[name] for name in COLUMNS), strict=True):
                writer.writerow(value if math.isfinite(value) else "" for value in row)

    @classmethod
    def load(cls, folder: str | Path) -> Recorder:
        """Reads record.json of a run's folder. What was not finite is NaN.

        Raises:
            OSError, ValueError: it is not there, or not a record.
        """
        path = Path(folder, RECORD)
        state = json.loads(path.read_text(encoding="utf-8"))
        recorder = cls()
        try:
            recorder.load_state_dict(_with_nan(state))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not written by Recorder.save") from error
        return recorder


def _with_nan(value: object) -> object:
    """NaN for each null: write_json makes the one of the other."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
