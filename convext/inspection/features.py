"""Features made by hand, before networks learned them: HOG, SIFT and ORB beside a CNN.

A descriptor is a function from images to vectors. A linear support vector machine then learns to
tell the classes apart by them, and by nothing else; `compare` measures how well it does, and what
the lesson's CNN, which learns its features too, makes of the same images.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from convext.inspection.descriptors import (
    DESCRIPTORS,
    grid_points,
    hog,
    hog_cells,
    orb,
    planes_of,
    raw_pixels,
    sift,
)
from convext.inspection.hough import HoughLine, HoughLines, hough_demo
from convext.mnist.data import Split
from convext.mnist.loader import BatchLoader
from convext.mnist.model import lesson_cnn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DESCRIPTORS",
    "Comparison",
    "FeatureRow",
    "HoughLine",
    "HoughLines",
    "compare",
    "grid_points",
    "hog",
    "hog_cells",
    "hough_demo",
    "orb",
    "raw_pixels",
    "sift",
    "train_cnn",
]

LIBRARIES = ("cv2", "lightning", "skimage", "sklearn")  # that `compare` needs besides torch
_COLUMNS = ("features", "length", "learned", "accuracy", "describe", "fit", "predict", "per image")


@dataclass(frozen=True)
class FeatureRow:
    """One kind of features, and how well and how fast digits are told apart by it.

    Attributes:
        name: of the descriptor, or "CNN".
        length: numbers that describe one image; None for the CNN, which learns its own.
        parameters: numbers learned: ten weights for each feature, and ten biases; the CNN's.
        accuracy: part of the validation images whose class was found.
        describe_seconds: to describe the training and the validation images.
        fit_seconds: to learn from the described training images; for the CNN from the images.
        predict_seconds: to classify the described validation images.
        seconds_per_image: to describe and classify one image, among many.
    """

    name: str
    length: int | None
    parameters: int
    accuracy: float
    describe_seconds: float
    fit_seconds: float
    predict_seconds: float
    seconds_per_image: float


@dataclass(frozen=True)
class Comparison:
    """The rows in the order of the descriptors, the CNN's last; and what they were measured on.

    `print` shows a table; so does rich.

    Attributes:
        rows: one for each kind of features.
        train_images, valid_images: how many there were.
        setting: how it was learned, in one line.
        examples: some validation images, (N, 1, H, W), for the picture.
    """

    rows: tuple[FeatureRow, ...]
    train_images: int
    valid_images: int
    setting: str
    examples: torch.Tensor = field(repr=False, compare=False)

    def __str__(self) -> str:
        table = [_COLUMNS, *self._cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([self.title, self.setting, "", lines[0], rule, *lines[1:]])

    def __rich__(self):
        from rich import box
        from rich.table import Table

        title = f"{self.title}\n{self.setting}\n"
        table = Table(
            title=title,
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            title_style="",
            title_justify="left",
        )
        for column, name in enumerate(_COLUMNS):
            table.add_column(name, justify="right" if column else "left", no_wrap=True)
        for row in self._cells():
            table.add_row(*row)
        return table

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.train_images:,} images to learn from, {self.valid_images:,} to validate with"

    def plot(self) -> Figure:
        """Draws what the descriptors see of the examples, Hough's lines, and the results."""
        from convext.inspection.features_plot import plot_comparison

        return plot_comparison(self)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                "" if row.length is None else f"{row.length:,}",
                f"{row.parameters:,}",
                f"{row.accuracy:.2%}",
                "" if row.length is None else f"{row.describe_seconds:.2f} s",
                f"{row.fit_seconds:.2f} s",
                f"{row.predict_seconds:.2f} s",
                f"{row.seconds_per_image * 1e6:,.0f} us",
            )
            for row in self.rows
        ]


def compare(
    train: Split,
    valid: Split,
    descriptors: Mapping[str, Callable[[torch.Tensor], np.ndarray]] = DESCRIPTORS,
    *,
    C: float = 0.1,
    epochs: int = 5,
    batch_size: int = 64,
    lr: float = 0.06,
    seed: int = 0,
    threads: int = 1,
) -> Comparison:
    """Learns the classes from each kind of features, and by the lesson's CNN; measures both.

    The classifier is scikit-learn's LinearSVC: ten hyperplanes, one class against the rest each.
    The CNN learns as in `convext train`: same loss, optimiser, schedule and order of images.

    Args:
        train, valid: images (N, 1, 28, 28), float32 in [0, 1], to learn from and to be judged by.
        descriptors: functions from images (N, 1, H, W) to features (N, D), by name.
        C: what a training image on the wrong side costs, the same for every descriptor. Learned
            from 3,000 of MNIST's training images and judged by 3,000 others, each was with 0.1
            less than a hundredth below its best of 1, 0.1 and 0.01.
        epochs, batch_size, lr, seed: of the CNN; see `convext train`.
        threads: of torch, OpenCV and the linear algebra, during this call.

    Raises:
        ValueError: images that won't do, or a number below what makes sense.
        ModuleNotFoundError: an extra is missing: features (OpenCV, scikit-image, scikit-learn)
            or train (Lightning).
    """
    for name, value in (("C", C), ("epochs", epochs), ("lr", lr), ("threads", threads)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    for name, split in (("train", train), ("valid", valid)):
        if split.images.shape[1:] != (1, 28, 28) or not len(split):
            shape = tuple(split.images.shape)
            raise ValueError(f"{name}.images must be of shape (N, 1, 28, 28), got {shape}")
        planes_of(split.images)
    if len(train.labels.unique()) < 2:
        raise ValueError("train must hold images of at least two classes, got one")
    for library in LIBRARIES:  # one that is missing is found before any work
        importlib.import_module(library)
    setting = (
        f"linear SVM with C = {C:g}; CNN for {epochs} {'epoch' if epochs == 1 else 'epochs'} of "
        f"batches of {min(batch_size, len(train))}, learning rate up to {lr:g}, seed {seed}; "
        f"{threads} {'thread' if threads == 1 else 'threads'}"
    )
    with _threads(threads):
        rows = [_svm_row(name, f, train, valid, C) for name, f in descriptors.items()]
        rows.append(_cnn_row(train, valid, epochs, batch_size, lr, seed))
    return Comparison(tuple(rows), len(train), len(valid), setting, _examples(valid))


def train_cnn(
    train: Split, *, epochs: int = 5, batch_size: int = 64, lr: float = 0.06, seed: int = 0
) -> torch.nn.Module:
    """The lesson's CNN, trained as `convext train` does with these options, silently.

    Raises:
        ModuleNotFoundError: Lightning, of the extra train, is missing.
    """
    from convext.mnist.learner import Learner

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = lesson_cnn(normalize=train.statistics())
    batches = BatchLoader(train.images, train.labels, batch_size, seed=seed, drop_last=True)
    learner = Learner(model, lr, total_steps=epochs * len(batches))
    configured = learner.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for epoch in range(epochs):
        batches.epoch = epoch
        for number, batch in enumerate(batches):
            optimizer.zero_grad()
            learner.training_step(batch, number).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _svm_row(
    name: str,
    describe: Callable[[torch.Tensor], np.ndarray],
    train: Split,
    valid: Split,
    C: float,
) -> FeatureRow:
    from sklearn.svm import LinearSVC

    described, describe_seconds = _timed(lambda: [describe(s.images) for s in (train, valid)])
    # The primal problem is solved the same way each time, the dual one in a random order.
    svm = LinearSVC(C=C, dual=False)
    _, fit_seconds = _timed(lambda: svm.fit(described[0], train.labels.numpy()))
    found, predict_seconds = _timed(lambda: svm.predict(described[1]))
    return FeatureRow(
        name=name,
        length=described[0].shape[1],
        parameters=svm.coef_.size + svm.intercept_.size,
        accuracy=float((found == valid.labels.numpy()).mean()),
        describe_seconds=describe_seconds,
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        seconds_per_image=describe_seconds / (len(train) + len(valid))
        + predict_seconds / len(valid),
    )


def _cnn_row(
    train: Split, valid: Split, epochs: int, batch_size: int, lr: float, seed: int
) -> FeatureRow:
    model, fit_seconds = _timed(
        lambda: train_cnn(train, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    )
    with torch.no_grad():
        found, predict_seconds = _timed(
            lambda: torch.cat([model(part).argmax(1) for part in valid.images.split(1000)])
        )
    return FeatureRow(
        name="CNN",
        length=None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        accuracy=(found == valid.labels).double().mean().item(),
        describe_seconds=0.0,
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        seconds_per_image=predict_seconds / len(valid),
    )


def _timed(work: Callable) -> tuple:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


@contextmanager
def _threads(number: int) -> Iterator[None]:
    import cv2
    from threadpoolctl import threadpool_limits  # scikit-learn needs it too

    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        with threadpool_limits(number):
            torch.set_num_threads(number)
            cv2.setNumThreads(number)
            yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _examples(valid: Split) -> torch.Tensor:
    """The first of each class of straight strokes, and of a round one, that there is."""
    numbers = [(valid.labels == digit).nonzero()[:1, 0] for digit in (1, 4, 7, 0)]
    return valid.images[torch.cat(numbers)]
