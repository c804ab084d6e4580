"""Batches cut from tensors in memory: one index_select each, no Python per sample."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

from convext.mnist.augment import Augmentation

Batch = TypeVar("Batch")


class BatchLoader:
    """Iterates over (images, labels) batches of a data set that is held in memory, of any device.

    With a seed, each epoch has its own order, a function of (seed, epoch) alone: the same for
    whatever network is trained, and the same when a run is resumed. Without one, the order is
    the data's own.

    A short last batch is dropped in training (`drop_last=True`), as fastai does it: every step
    then averages over the same number of images, and batch normalisation never meets a batch
    of one image, whose 1x1 maps would have no variance. Nothing is lost, since the next epoch
    leaves out others. In validation every image counts, so it is kept there. A data set
    smaller than one batch gives one batch with all of it.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        batch_size: images in a batch, at least 1; with drop_last a multiple of `parts`.
        seed: shuffles with it; None keeps the order.
        drop_last: leaves out a short last batch.
        part, parts: gives only this part of every batch, from 0, of so many. In the order of
            their numbers the parts join to the batch. With drop_last they are of equal size, for
            which a data set smaller than one batch is cut; else they may differ by one image.
        augment: moves the images of every batch at random, which is a function of (seed, epoch,
            number of the batch) alone; it needs a seed.

    Attributes:
        epoch: which order the next iteration takes, from 0. Whoever trains sets it.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        part: int = 0,
        parts: int = 1,
        augment: Augmentation | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= part < parts:
            raise ValueError(f"part must be from 0 to parts - 1, got {part} of {parts}")
        if augment is not None and seed is None:
            raise ValueError("augment needs a seed, got none")
        self.images = images
        self.labels = labels
        self.batch_size = min(batch_size, len(images))
        if drop_last:
            if batch_size % parts or len(images) < parts:
                raise ValueError(
                    f"batches of {batch_size} out of {len(images)} images don't make {parts} "
                    "equal parts"
                )
            self.batch_size -= self.batch_size % parts
        self.part = part
        self.parts = parts
        self.seed = seed
        self.drop_last = drop_last
        self.augment = augment
        self.epoch = 0
        self._first = 0  # the batch that the next iteration starts with, after load_state_dict
        self._done = 0  # batches handed out in the iteration under way

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first, self._first = self._first, 0
        order = self._order().to(self.images.device)
        for number in range(first, len(self)):
            # Counted before it is handed out: a checkpoint is saved when its step is done.
            self._done = number + 1
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            chosen = batch.tensor_split(self.parts)[self.part]
            images = self.images.index_select(0, chosen)
            if self.augment is not None:
                # For the whole batch, so that the parts join to it.
                moves = self.augment.draw(len(batch), self._generator(number))
                images = self.augment.move(images, moves.tensor_split(self.parts)[self.part])
            yield images, self.labels.index_select(0, chosen)

    def _order(self) -> torch.Tensor:
        if self.seed is None:
            return torch.arange(len(self.images))
        return torch.randperm(len(self.images), generator=self._generator())

    def _generator(self, *key: int) -> torch.Generator:
        # SeedSequence mixes all numbers well, so that neighbours do not give like orders.
        mixed = np.random.SeedSequence((self.seed, self.epoch), spawn_key=key)
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands; a checkpoint holds it."""
        epochs, batch = divmod(self._done, len(self))
        return {"epoch": self.epoch + epochs, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where `state_dict` was taken."""
        self.epoch = state["epoch"]
        self._first = self._done = state["batch"]


def first(batches: Iterable[Batch]) -> Batch:
    """The first batch, as fastcore's `first(dl)`: a look at what a model will be given.

    A `BatchLoader` stays where it stands.

    Raises:
        StopIteration: there is none.
    """
    return next(iter(copy.copy(batches) if isinstance(batches, BatchLoader) else batches))
