"""How a classifier does on images whose classes are known: right, wrong, and how wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model made of N images of K classes.

    Attributes:
        probabilities: the softmax of the scores, (N, K), float32.
        losses: the cross entropy of each image, (N,), float32: -log of its class's probability.
        labels: the classes, (N,), int64.
    """

    probabilities: Tensor
    losses: Tensor
    labels: Tensor

    @property
    def predictions(self) -> Tensor:
        """The class with the highest probability, (N,), int64."""
        return self.probabilities.argmax(1)

    @property
    def correct(self) -> int:
        """How many predictions are right."""
        return int((self.predictions == self.labels).sum())

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return float(self.losses.double().mean())

    def confusion(self) -> Tensor:
        """How many images of each class were taken for which: (K, K), int64.

        Rows are the true classes, columns the predicted ones, as in scikit-learn.
        """
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.predictions
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def worst(self, count: int) -> Tensor:
        """The numbers of the images with the highest losses, the worst first: (count,), int64.

        A loss that is no number is the worst of all. There are fewer where N is less than count.
        """
        losses = self.losses.nan_to_num(nan=torch.inf, posinf=torch.inf)
        return losses.argsort(descending=True, stable=True)[:count]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> Evaluation:
    """Runs a classifier in evaluation mode on images whose classes are known.

    Args:
        model: from images to class scores (N, K). It is left as it was.
        images: (N, C, H, W), on the model's device.
        labels: (N,), int64, from 0 to K - 1.
        batch: images at once, which changes nothing but the memory that it takes.

    Raises:
        ValueError: there are no images, or more or fewer labels, or a batch below 1.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(
            f"images and labels must be equally many, got {len(images)}, {len(labels)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        scores = torch.cat([model(part).float() for part in images.split(batch)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    losses = F.cross_entropy(scores, labels, reduction="none")
    return Evaluation(scores.softmax(1).cpu(), losses.cpu(), labels.cpu())
