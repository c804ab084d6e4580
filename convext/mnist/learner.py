"""What Lightning trains: the network, its loss, the optimiser and the 1cycle schedule."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

# fastai's 1cycle: a quarter of the run up from max_lr / 25, the rest down to max_lr / 100,000,
# both along a cosine, while the momentum goes the other way.
PCT_START = 0.25
DIV_FACTOR = 25.0
FINAL_DIV_FACTOR = 100_000 / DIV_FACTOR  # torch divides the initial rate, fastai the maximum
BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95


class Learner(pl.LightningModule):
    """A classifier with its training step, and the history of its epochs.

    Nothing here reads a number from the device before the epoch's end: a read per step would
    make the device wait for Python.

    Args:
        model: from images to class scores.
        lr: the schedule's maximum.
        total_steps: optimiser steps in the whole run, over which the schedule is spread.

    Attributes:
        history: one dict per finished epoch: epoch, accuracy, valid_loss, train_loss,
            train_seconds. Saved with the checkpoint.
    """

    def __init__(self, model: nn.Module, lr: float, total_steps: int) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.total_steps = total_steps
        self.history: list[dict[str, float]] = []
        self._train_loss = torch.zeros(())
        self._train_batches = 0
        self._valid_loss = torch.zeros(())
        self._correct = torch.zeros((), dtype=torch.int64)
        self._images = 0
        self._started = self._epoch_seconds = self._epoch_loss = 0.0

    def configure_optimizers(self) -> dict:
        # Weight decay is AdamW's, decoupled, and only for what multiplies inputs: fastai, too,
        # leaves biases and batch norm alone. Betas and eps are fastai's.
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(MAX_MOMENTUM, 0.99),
            eps=1e-5,
            weight_decay=0.01,
            fused=True,  # one kernel for all parameters: 0.2 ms a step, a loop takes 0.9
        )
        schedule = OneCycleLR(
            optimizer,
            max_lr=self.lr,
            total_steps=self.total_steps,
            # Torch divides by pct_start * total_steps - 1, which must not be 0.
            pct_start=PCT_START if PCT_START * self.total_steps != 1 else 2 * PCT_START,
            div_factor=DIV_FACTOR,
            final_div_factor=FINAL_DIV_FACTOR,
            base_momentum=BASE_MOMENTUM,
            max_momentum=MAX_MOMENTUM,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        # Within an epoch where it is resumed there, which Lightning does not start again.
        self._train_loss = self._train_loss.to(self.device)
        self._started = time.perf_counter() - self._epoch_seconds

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.epoch = self.current_epoch
        self._train_loss = torch.zeros((), device=self.device)
        self._train_batches = 0
        self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the epoch's clock while the block runs."""
        self._stop_clock()
        yield
        self._started = time.perf_counter() - self._epoch_seconds

    def _stop_clock(self) -> None:
        # Reading the loss first makes it count what the device has yet to finish.
        self._epoch_loss = self._train_loss.item() / max(1, self._train_batches)
        self._epoch_seconds = time.perf_counter() - self._started

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self._train_loss += loss.detach()
        self._train_batches += 1
        return loss

    def on_validation_epoch_start(self) -> None:
        self._stop_clock()  # Lightning validates within the training epoch
        self._valid_loss = torch.zeros((), device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self._images = 0

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        images, labels = batch
        scores = self.model(images)
        self._valid_loss += F.cross_entropy(scores, labels, reduction="sum")
        self._correct += (scores.argmax(dim=1) == labels).sum()
        self._images += len(labels)

    def on_validation_epoch_end(self) -> None:
        # Of all processes; float64 holds each of these as it is.
        sums = torch.tensor(
            [self._correct.item(), self._valid_loss.item(), self._images, self._epoch_loss],
            dtype=torch.float64,
        )
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        correct, valid_loss, images, train_loss = sums.tolist()
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "accuracy": correct / images,
                "valid_loss": valid_loss / images,
                "train_loss": train_loss / self.trainer.world_size,
                "train_seconds": self._epoch_seconds,
            }
        )
        self._train_loss = torch.zeros((), device=self.device)
        self._train_batches = 0
        self._epoch_seconds = 0.0

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """In all processes, and within an epoch while its clock is `paused`."""
        checkpoint["history"] = self.history
        checkpoint["epoch_under_way"] = {
            "batches": self._train_batches,
            "loss": self.all_gather(self._train_loss).reshape(-1).tolist(),  # of each process
            "seconds": self._epoch_seconds,
        }
        checkpoint["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = list(checkpoint["history"])
        # Of before there was such an entry, checkpoints are of an epoch's end.
        epoch = checkpoint.get("epoch_under_way", {"batches": 0, "loss": [0.0], "seconds": 0.0})
        losses = epoch["loss"]
        if len(losses) != self.trainer.world_size:  # then their mean is what has to be kept
            losses = [sum(losses) / len(losses)] * self.trainer.world_size
        self._train_loss = torch.tensor(losses[self.trainer.global_rank])
        self._train_batches = epoch["batches"]
        self._epoch_seconds = epoch["seconds"]
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)
        steps, total = (checkpoint["lr_schedulers"][0][k] for k in ("last_epoch", "total_steps"))
        if total != self.total_steps:
            self._respread_schedule(checkpoint, steps)

    def _respread_schedule(self, checkpoint: dict, steps: int) -> None:
        """Puts into the checkpoint the schedule of this run's length, `steps` steps on.

        The checkpoint comes from a shorter or longer run. Left alone, its schedule would end
        where that run was to end.
        """
        configured = self.configure_optimizers()
        schedule = configured["lr_scheduler"]["scheduler"]
        schedule.last_epoch = steps - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimiser step came before this one
            schedule.step()
        checkpoint["lr_schedulers"] = [schedule.state_dict()]
        saved = checkpoint["optimizer_states"][0]["param_groups"]
        for group, fresh in zip(saved, configured["optimizer"].param_groups, strict=True):
            group.update({key: fresh[key] for key in ("lr", "betas", "initial_lr")})
