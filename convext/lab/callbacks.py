"""Lightning's side of the lab: callbacks that feed a record and the statistics of layers."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from convext.lab.activation_stats import ActivationStats
from convext.lab.recorder import Recorder


class RecordRun(pl.Callback):
    """Keeps a `Recorder`, also in the checkpoint, so that a resumed run has the whole record."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        # Here, since after the step the scheduler may have set the next one's.
        group = optimizer.param_groups[0]
        momentum = group["betas"][0] if "betas" in group else group.get("momentum", math.nan)
        self._told = (float(group["lr"]), float(momentum))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        lr, momentum = self._told
        self.recorder.batch(
            step=trainer.global_step - 1,
            epoch=trainer.current_epoch + 1,
            loss=outputs["loss"],
            lr=lr,
            momentum=momentum,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.recorder.epochs = [dict(row) for row in module.history]

    def state_dict(self) -> dict[str, Any]:
        # As tensors, which are saved ten times as fast as lists of numbers.
        state = self.recorder.state_dict()
        columns = {
            name: torch.from_numpy(np.array(column)) for name, column in state["batches"].items()
        }
        return {**state, "batches": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        columns = {name: column.tolist() for name, column in state["batches"].items()}
        self.recorder.load_state_dict({**state, "batches": columns})


class CollectActivations(pl.Callback):
    """Attaches an `ActivationStats` while the model trains, and keeps it in the checkpoint."""

    def __init__(self, stats: ActivationStats) -> None:
        self.stats = stats

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stats.attach()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stats.detach()

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self.stats.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.stats.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stats.load_state_dict(state)
