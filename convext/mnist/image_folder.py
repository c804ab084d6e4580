"""A folder of pictures as a data set: a sub-folder for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convext.inspection.pictures import open_picture
from convext.mnist.data import DataError, Dataset, Split

SIZE = (28, 28)
VALID_SHARE = 5  # one picture in so many is kept for validation, where the folder does not say


def load_image_folder(
    folder: str | Path, size: tuple[int, int] | None = None, colour: bool | None = None
) -> Dataset:
    """Loads the pictures of a folder, each class in a sub-folder that has its name.

    Where the folder holds `train` and `valid`, the classes are sub-folders of these. Else a fifth
    of each class is kept for validation, chosen by a hash of the files' names: the same on every
    machine, and little changed by a few files more. Hidden files are passed over; any other file
    must be a picture.

    Args:
        folder: the folder.
        size: (H, W) that each picture is brought to, whatever its shape; None is 28x28.
        colour: three channels or one. None takes three where any picture has a pixel that is
            not grey.

    Returns:
        The data set; its name is the folder's path, and its content a hash of all pixels, labels
        and names of classes.

    Raises:
        DataError: naming the file or folder, and the reason.
    """
    folder = Path(folder).expanduser().resolve()
    try:
        classes, train, valid = _find(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}") from error
    pixels = _read([path for path, _ in (*train, *valid)], size or SIZE, colour)
    labels = torch.tensor([label for _, label in (*train, *valid)])
    digest = hashlib.sha256("\0".join((str(len(train)), *classes)).encode())
    for array in (pixels, labels.numpy()):
        digest.update(str(array.shape).encode())
        digest.update(array)
    images = torch.from_numpy(pixels).float() / 255
    cut = len(train)
    return Dataset(
        name=str(folder),
        train=Split(images[:cut], labels[:cut]),
        valid=Split(images[cut:], labels[cut:]),
        source=f"a folder for each of {len(classes)} classes",
        classes=classes,
        content=digest.hexdigest(),
    )


def read_pictures(paths: Sequence[str | Path], size: tuple[int, int], colour: bool) -> Tensor:
    """Reads pictures as `load_image_folder` does.

    Returns:
        (N, C, H, W), float32 in [0, 1]; C is 3 with colour, else 1.

    Raises:
        DataError: naming the file, and the reason.
    """
    return torch.from_numpy(_read(paths, size, colour)).float() / 255


def _read(paths: Sequence[str | Path], size: tuple[int, int], colour: bool | None) -> np.ndarray:
    """(N, C, H, W), uint8."""
    mode = "L" if colour is False else "RGB"
    pixels = np.ascontiguousarray([_read_one(Path(path), size, mode) for path in paths])
    if colour is None and (pixels == pixels[:, :1]).all():
        pixels = pixels[:, :1].copy()  # as grey as if it had been read so
    return pixels


def _read_one(path: Path, size: tuple[int, int], mode: str) -> np.ndarray:
    try:
        picture = open_picture(path).convert(mode).resize(size[::-1])
    except ModuleNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # broken files raise whatever they please
        reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise DataError(f"{path}: {reason.splitlines()[0]}") from error
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


Labelled = list[tuple[Path, int]]


def _find(folder: Path) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """The classes' names, and the files to train on and to validate with, each with its class."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    halves = folder / "train", folder / "valid"
    if not any(half.is_dir() for half in halves):
        classes = _classes(folder, least=2)
        train, valid = [], []
        for label, name in enumerate(classes):
            kept, others = _cut(folder / name)
            valid += [(path, label) for path in kept]
            train += [(path, label) for path in others]
        return classes, train, valid
    for half, other in (halves, halves[::-1]):
        if not half.is_dir():
            raise DataError(f"{folder}: holds {other.name}, so it must hold {half.name} besides")
    classes = _classes(halves[0], least=2)
    for name in _classes(halves[1], least=1):
        if name not in classes:
            raise DataError(f"{halves[1] / name}: a class that {halves[0]} has not")
    train, valid = (
        [
            (path, label)
            for label, name in enumerate(classes)
            if (half / name).is_dir()
            for path in _files(half / name)
        ]
        for half in halves
    )
    return classes, train, valid


def _classes(folder: Path, least: int) -> tuple[str, ...]:
    names = sorted(path.name for path in _shown(folder) if path.is_dir())
    if not names:
        raise DataError(f"{folder}: holds no folder; each class's pictures lie in one of its name")
    if len(names) < least:
        raise DataError(f"{folder}: holds one class, {names[0]}; there must be at least {least}")
    return tuple(names)


def _cut(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a class that are kept for validation, and the others."""
    files = _files(folder)
    if len(files) < 2:
        raise DataError(f"{folder}: holds one picture; one to train on, one to validate with")

    def rank(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    kept = set(sorted(files, key=rank)[: max(1, len(files) // VALID_SHARE)])
    return [f for f in files if f in kept], [f for f in files if f not in kept]


def _files(folder: Path) -> list[Path]:
    """All files in a class's folder and the folders in it, in an order that every machine has."""
    files = sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not files:
        raise DataError(f"{folder}: holds no pictures")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for path in _shown(folder):
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _shown(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))
