"""The learning-rate finder: a short training whose rate grows at every step, until it diverges."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.tuner import Tuner

from convext.lab.charts import plot_lr_finding, smoothed
from convext.mnist.callbacks import InterruptError, interruptible
from convext.mnist.quiet import QuietLightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LrFinding:
    """What a sweep over learning rates found.

    Attributes:
        rates: of each step, rising.
        losses: of each step's batch, before the step.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @cached_property
    def smoothed(self) -> np.ndarray:
        """The losses as fastai smooths them; NaN where a loss was not finite."""
        return smoothed(np.array(self.losses))

    @property
    def lowest(self) -> float | None:
        """The rate where the smoothed loss was lowest; None if it never fell."""
        if not np.isfinite(self.smoothed).any() or np.nanargmin(self.smoothed) == 0:
            return None
        return self.rates[np.nanargmin(self.smoothed)]

    @property
    def steepest(self) -> float | None:
        """The rate where the smoothed loss fell fastest, over the rate's logarithm."""
        if self.lowest is None:
            return None
        slope = np.gradient(self.smoothed, np.log(self.rates))
        return self.rates[np.nanargmin(slope)] if np.isfinite(slope).any() else None

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate where the loss was lowest, as the fastai book has it (chapter 5).

        Lightning's own suggestion is not used: it looks for the steepest fall over the rate itself
        and not its logarithm, where the noise at the smallest rates is steeper than any fall.
        """
        return None if self.lowest is None else self.lowest / 10

    def __str__(self) -> str:
        lines = [f"{len(self.rates)} steps, rates from {self.rates[0]:.2g} to {self.rates[-1]:.2g}"]
        if self.suggestion is None:
            return f"{lines[0]}\nno suggestion: the loss never fell"
        lines.append(f"lowest loss    {np.nanmin(self.smoothed):.3f}, at {self.lowest:.2g}")
        if self.steepest is not None:
            lines.append(f"steepest fall  at {self.steepest:.2g}")
        return "\n".join([*lines, f"suggestion     {self.suggestion:.2g}"])

    def plot(self) -> Figure:
        """Losses over rates, with the suggestion, the steepest fall and the lowest loss."""
        return plot_lr_finding(self)


def find_lr(
    learner: pl.LightningModule,
    batches: Iterable,
    *,
    min_rate: float = 1e-6,
    max_rate: float = 10.0,
    steps: int = 100,
) -> LrFinding:
    """Trains a copy of the learner with a rate that grows exponentially, by Lightning's Tuner.

    Smith 2017, "Cyclical learning rates for training neural networks", section 3.3. The Tuner
    stops when the smoothed loss is four times the best. The learner, the batches and torch's
    random numbers are left as they were, and no file remains.

    Args:
        learner: with one optimiser; it trains where its parameters are.
        batches: what it is trained with, over and over if need be.
        min_rate, max_rate: of the first and about of the last step.
        steps: how many, at most.

    Raises:
        ValueError: rates that don't rise from above 0, or fewer than two steps.
        KeyboardInterrupt: Ctrl-C.
    """
    if not 0 < min_rate < max_rate < math.inf:
        raise ValueError(
            f"min_rate and max_rate must rise and be above 0, got {min_rate} and {max_rate}"
        )
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    learner, batches = copy.deepcopy(learner), copy.copy(batches)
    losses = _noted_losses(learner)
    device = next(learner.parameters()).device
    with (
        tempfile.TemporaryDirectory(prefix="convext-") as folder,  # the Tuner's own checkpoint
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        QuietLightning(),
        contextlib.redirect_stderr(io.StringIO()),  # its progress bar
        interruptible(),
    ):
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        try:
            found = Tuner(trainer).lr_find(
                learner,
                batches,
                min_lr=min_rate,
                max_lr=max_rate,
                num_training=steps,
                update_attr=False,
            )
        except InterruptError:
            raise KeyboardInterrupt from None
    losses = torch.stack(losses).double().tolist()
    return LrFinding(tuple(map(float, found.results["lr"])), tuple(losses))


def _noted_losses(learner: pl.LightningModule) -> list[torch.Tensor]:
    """A list that each training step's loss will be added to.

    The Tuner keeps smoothed losses only, the first of which are too small by up to a half: it
    takes the bias of one step more out of them. And it lets no other callback see the steps.
    """
    losses: list[torch.Tensor] = []
    after = learner.on_train_batch_end

    def note(outputs, batch, batch_idx: int) -> None:
        losses.append(outputs["loss"].detach().clone())
        after(outputs, batch, batch_idx)

    learner.on_train_batch_end = note
    return losses
