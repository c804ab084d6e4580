"""One training run of an experiment: what is to be trained, and what came of it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from torch.nn import functional as F

from convext.inspection.summary import summary
from convext.lab.activation_stats import ActivationStats, LayerStats
from convext.lab.callbacks import CollectActivations, RecordRun
from convext.lab.gradient_noise import MeasureNoise
from convext.lab.networks import Network
from convext.lab.recorder import Recorder
from convext.mnist.data import Dataset
from convext.mnist.learner import Learner
from convext.mnist.loader import BatchLoader
from convext.mnist.train import VALID_BATCH, fit

SCHEDULES = ("1cycle", "1cycle, constant momentum", "constant")
CONSTANT_MOMENTUM = 0.9  # Adam's beta1 where it is not cycled, fastai's too
NOISE_IMAGES = 8192  # the gradient noise is measured on about so many


@dataclass(frozen=True)
class Variant:
    """How one of an experiment's networks is trained.

    Attributes:
        network: its plan.
        batch_size: images in a step.
        lr: the schedule's highest rate.
        schedule: one of SCHEDULES.
        may_refuse: whether an error of its first step is a result, not a mistake.
    """

    network: Network
    batch_size: int
    lr: float
    schedule: str = "1cycle"
    may_refuse: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")


@dataclass(frozen=True)
class Run:
    """What came of training one variant from one seed.

    Attributes:
        variant: its label.
        seed: of the weights and of the images' order.
        figures: accuracy, valid_loss, train_loss, train_seconds (of the steps alone), cpu_seconds
            (the same by the process's clock, which stands while other processes run), updates,
            parameters, multiplications (of one image); near_zero and noise_scale where the
            experiment measures them.
        history: the learner's rows, one for each epoch.
        losses: of each step's batch.
        activations: the deepest activation's statistics, where the experiment shows them, of the
            variant's worst run.
    """

    variant: str
    seed: int
    figures: dict[str, float]
    history: tuple[dict[str, float], ...]
    losses: tuple[float, ...]
    activations: LayerStats | None = None

    def to_json(self) -> dict:
        """As plain values; what is not finite becomes null where it is written."""
        plain = {**vars(self), "history": list(self.history), "losses": list(self.losses)}
        if self.activations is not None:
            arrays = asdict(self.activations)
            plain["activations"] = {
                key: None if value is None else np.asarray(value).tolist()
                for key, value in arrays.items()
            }
        return plain

    @classmethod
    def from_json(cls, plain: dict) -> Run:
        """Reads `to_json`'s values; null becomes NaN."""
        found = plain["activations"]
        stats = found and LayerStats(
            **{
                key: None
                if value is None
                else np.array(value, dtype=np.int64 if key == "batches" else float)
                for key, value in found.items()
            }
        )
        return cls(
            variant=plain["variant"],
            seed=plain["seed"],
            figures={key: _number(value) for key, value in plain["figures"].items()},
            history=tuple({k: _number(v) for k, v in row.items()} for row in plain["history"]),
            losses=tuple(map(_number, plain["losses"])),
            activations=stats,
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _ScheduledLearner(Learner):
    """A learner whose rate or momentum may be constant."""

    def __init__(self, variant: Variant, total_steps: int) -> None:
        super().__init__(variant.network.build(), variant.lr, total_steps)
        self._schedule = variant.schedule

    def configure_optimizers(self) -> dict:
        configured = super().configure_optimizers()
        if self._schedule == "1cycle":
            return configured
        configured["lr_scheduler"]["scheduler"].cycle_momentum = False
        for group in configured["optimizer"].param_groups:
            group["betas"] = (CONSTANT_MOMENTUM, group["betas"][1])
            if self._schedule == "constant":
                group["lr"] = self.lr
        if self._schedule == "constant":
            del configured["lr_scheduler"]
        return configured


class _CpuTime(pl.Callback):
    """The seconds that this process's threads work in the steps of training."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds -= time.process_time()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds += time.process_time()


def refusal(variant: Variant, dataset: Dataset) -> str | None:
    """What PyTorch or convext says instead of making a first step, None where it makes one."""
    images, labels = dataset.train.images[: variant.batch_size], dataset.train.labels
    try:
        scores = variant.network.build().train()(images)
        F.cross_entropy(scores, labels[: len(images)]).backward()
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def run_variant(
    label: str,
    variant: Variant,
    dataset: Dataset,
    *,
    epochs: int,
    seed: int,
    near_zero: bool = False,
    histograms: bool = False,
    noise: bool = False,
) -> Run:
    """Trains a variant on the CPU and measures it.

    Args:
        label: its name in the experiment.
        dataset: trained on and validated with.
        near_zero: also the share of zeros that the deepest activation function puts out, as a
            mean over the last tenth of the steps.
        histograms: also that function's histograms, for color_dim.
        noise: also the gradient noise scale, half-way through the run.
    """
    torch.manual_seed(seed)
    train, valid = dataset.train, dataset.valid
    batches = BatchLoader(train.images, train.labels, variant.batch_size, seed=seed, drop_last=True)
    learner = _ScheduledLearner(variant, total_steps=epochs * len(batches))
    # Of two images, since with one group norm would refuse a map of 1x1.
    described = summary(learner.model, (2, *train.images.shape[1:]))

    recorder = Recorder()
    cpu = _CpuTime()
    callbacks = [RecordRun(recorder), cpu]
    stats = probe = None
    if near_zero or histograms:
        deepest = [name for name, _ in learner.model.named_children() if "relu" in name][-1]
        stats = ActivationStats(learner.model, [deepest], histograms=histograms)
        callbacks.append(CollectActivations(stats))
    if noise:
        small = min(variant.batch_size, len(train) // 2)
        some = slice(0, max(NOISE_IMAGES, 2 * small))
        probe = MeasureNoise(
            train.images[some],
            train.labels[some],
            step=max(1, learner.total_steps // 2),
            small=small,
        )
        callbacks.append(probe)

    validation = BatchLoader(valid.images, valid.labels, VALID_BATCH)
    fit(learner, batches, validation, epochs=epochs, callbacks=callbacks)

    history = learner.history
    figures = {
        **{name: history[-1][name] for name in ("accuracy", "valid_loss", "train_loss")},
        "train_seconds": sum(row["train_seconds"] for row in history),
        "cpu_seconds": cpu.seconds,
        "updates": len(recorder),
        "parameters": described.parameters,
        "multiplications": described.multiplications,
    }
    if probe is not None:
        figures["train_seconds"] -= probe.seconds
        figures["cpu_seconds"] -= probe.cpu_seconds
        figures["noise_scale"] = probe.noise.scale
    activations = None
    if stats is not None:
        found = stats.layer(0)
        last = max(1, len(found.near_zero) // 10)
        figures["near_zero"] = float(found.near_zero[-last:].mean())
        activations = found if histograms else None
    losses = tuple(recorder.batches["loss"])
    return Run(label, seed, figures, tuple(history), losses, activations)
