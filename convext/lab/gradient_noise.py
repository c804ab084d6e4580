"""How much the gradients of batches differ from the gradient of all images."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GradientNoise:
    """The gradient of a loss and its noise, both estimated without bias.

    Attributes:
        squared: |G|^2, the squared length of the gradient of all images. Where noise hides the
            gradient the estimate can be negative.
        trace: tr(Sigma), the variance of one image's gradient, summed over all parameters.
    """

    squared: float
    trace: float

    @property
    def scale(self) -> float:
        """The simple noise scale, tr(Sigma) / |G|^2, in images; NaN where |G|^2 is not above 0.

        A batch of so many images has as much noise as gradient: its gradient's relative squared
        error is scale / batch size.
        """
        return self.trace / self.squared if self.squared > 0 else math.nan


def gradient_noise(
    model: nn.Module, images: Tensor, labels: Tensor, small: int = 64
) -> GradientNoise:
    """Estimates gradient and noise from the gradients of batches and of all of them together.

    McCandlish, Kaplan, Amodei et al., An Empirical Model of Large-Batch Training (2018), appendix
    A.1. With batch norm in training mode the gradient depends on the batch size, too: `small` is to
    be that of the training.

    Args:
        model: from images to class scores. A copy of it runs, in the mode that it is in.
        images: (N, C, H, W). What is left over after the last whole batch isn't used.
        labels: (N,), int64.
        small: images in a batch.

    Raises:
        ValueError: fewer than two batches.
    """
    count = len(images) // small
    if count < 2:
        raise ValueError(f"images must make two batches of {small} or more, got {len(images)}")
    model = copy.deepcopy(model)  # batch norm's running statistics change
    parameters = [p for p in model.parameters() if p.requires_grad]
    means = [torch.zeros_like(p) for p in parameters]
    small_squared = 0.0
    with torch.enable_grad():
        for number in range(count):
            part = slice(number * small, (number + 1) * small)
            loss = F.cross_entropy(model(images[part]), labels[part])
            gradients = torch.autograd.grad(loss, parameters)
            small_squared += _squared(gradients) / count
            for mean, gradient in zip(means, gradients, strict=True):
                mean += gradient / count
    large = count * small
    large_squared = _squared(means)
    return GradientNoise(
        squared=(large * large_squared - small * small_squared) / (large - small),
        trace=(small_squared - large_squared) / (1 / small - 1 / large),
    )


def _squared(tensors: list[Tensor] | tuple[Tensor, ...]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors)


class MeasureNoise(pl.Callback):
    """Measures the gradient noise once, after a given step.

    Attributes:
        noise: the result, None before.
        seconds, cpu_seconds: that it took, which clocks outside count as training.
    """

    def __init__(self, images: Tensor, labels: Tensor, step: int, small: int) -> None:
        self._images, self._labels, self._step, self._small = images, labels, step, small
        self.noise: GradientNoise | None = None
        self.seconds = self.cpu_seconds = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            started, worked = time.perf_counter(), time.process_time()
            self.noise = gradient_noise(module.model, self._images, self._labels, self._small)
            self.seconds = time.perf_counter() - started
            self.cpu_seconds = time.process_time() - worked
