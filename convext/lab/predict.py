"""What a trained run makes of pictures from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convext.mnist.image_folder import read_pictures
from convext.mnist.settings import Settings

BATCH = 256  # pictures at once; a constant, since it changes no result
# Of a digit's border, mean brightness: MNIST's is 0, and a photograph of ink on paper has above.
BRIGHT_BORDER = 0.5


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities of some pictures.

    `print` shows a line for each picture, and the notes.

    Attributes:
        names: of the pictures' files, N.
        images: what the model was given, (N, C, H, W), float32 in [0, 1].
        classes: their names, K.
        probabilities: (N, K), float32; each row sums to 1.
        notes: what people should know of some pictures, a line each.
        shown: how many classes of a picture are printed, the likeliest first.
    """

    names: tuple[str, ...]
    images: Tensor
    classes: tuple[str, ...]
    probabilities: Tensor
    notes: tuple[str, ...]
    shown: int = 3

    def top(self, image: int) -> list[tuple[str, float]]:
        """The likeliest classes of one picture with their probabilities, falling."""
        likeliest = self.probabilities[image].topk(min(self.shown, len(self.classes)))
        return [
            (self.classes[label], probability)
            for probability, label in zip(
                likeliest.values.tolist(), likeliest.indices.tolist(), strict=True
            )
        ]

    def __str__(self) -> str:
        rows = [[name, *self._cells(number)] for number, name in enumerate(self.names)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.notes])

    def _cells(self, image: int) -> list[str]:
        return [f"{name} {probability:.1%}" for name, probability in self.top(image)]


def predict(
    model: nn.Module,
    settings: Settings,
    paths: Sequence[str | Path],
    *,
    invert: bool = False,
    shown: int = 3,
) -> Predictions:
    """Reads pictures as those of the run's training were read, and classifies them.

    Each is made grey or coloured and brought to the run's size, whole, whatever its shape.

    Args:
        model, settings: see `convext.mnist.run_folder.load_trained`.
        paths: the files.
        invert: turns every picture to its negative first: MNIST's digits are white on black.
        shown: how many classes of a picture are printed.

    Raises:
        DataError: naming the file, and the reason.
        ValueError: no paths, or `shown` below 1.
    """
    if not paths:
        raise ValueError("paths must hold at least one, got none")
    if shown < 1:
        raise ValueError(f"shown must be at least 1, got {shown}")
    images = read_pictures(paths, settings.image_size, settings.colour)
    if invert:
        images = 1 - images
    with torch.no_grad():
        scores = torch.cat([model(batch) for batch in images.split(BATCH)])
    names = tuple(map(str, paths))
    return Predictions(
        names=names,
        images=images,
        classes=settings.classes,
        probabilities=scores.softmax(1),
        notes=tuple(_notes(names, images, settings, invert)),
        shown=shown,
    )


def _notes(names: Sequence[str], images: Tensor, settings: Settings, invert: bool) -> list[str]:
    notes = []
    empty = images.flatten(1).amax(1) == images.flatten(1).amin(1)
    if empty.any():
        notes.append(f"of one colour all over (transparency is left out): {_named(names, empty)}")
    if settings.content is None:  # digits, which are white on black
        edge = torch.ones(images.shape[2:], dtype=torch.bool)
        edge[1:-1, 1:-1] = False
        bright = (images[..., edge].mean((1, 2)) > BRIGHT_BORDER) & ~empty
        if bright.any():
            notes.append(
                f"looks inverted{' by --invert' if invert else ', try --invert'} (bright at its "
                f"border, and the run's digits are white on black): {_named(names, bright)}"
            )
    return notes


def _named(names: Sequence[str], which: Tensor) -> str:
    return ", ".join(name for name, named in zip(names, which.tolist(), strict=True) if named)
