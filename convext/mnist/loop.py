"""Training in a few lines, for experiments of a second or two; `convext train` is for the rest."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from convext.mnist.data import Split
from convext.mnist.loader import BatchLoader


def fit(
    model: nn.Module,
    data: Split,
    lr: float,
    *,
    epochs: int = 1,
    batch_size: int = 64,
    one_cycle: bool = True,
    seed: int = 0,
) -> list[float]:
    """Trains a classifier by Adam and cross-entropy, and leaves it in eval mode.

    Args:
        model: from images to class scores, on the device of the data.
        data: what to train on.
        lr: the learning rate; with `one_cycle` its maximum, reached after a quarter of the steps,
            while momentum goes from 0.95 to 0.85 and back.
        epochs: times through the data, in another order each time. A last batch that is not
            full is left out.
        batch_size: images in each step.
        one_cycle: False keeps the rate, and Adam's momentum of 0.9, throughout.
        seed: of the order of the images.

    Returns:
        The loss of each step.

    Raises:
        ValueError: epochs below 1, or a batch_size or data that `BatchLoader` does not take.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    loader = BatchLoader(data.images, data.labels, batch_size, seed=seed, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * len(loader)
    rise = 0.25 if steps != 4 else 0.5  # torch divides by the steps of the rise less one
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise) if one_cycle else None
    losses = []
    model.train()
    for loader.epoch in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


def accuracy(model: nn.Module, data: Split) -> float:
    """The share of images, from 0 to 1, whose highest score is that of their class.

    The model is run as it is, in one batch: in eval mode after `fit`.
    """
    with torch.no_grad():
        return (model(data.images).argmax(dim=1) == data.labels).float().mean().item()
