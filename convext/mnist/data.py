"""The data sets, held in memory as tensors: MNIST, and scikit-learn's digits in its place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from convext.mnist.idx import DataError, read_idx

__all__ = ["DataError", "Dataset", "Split", "load_data", "load_digits", "load_mnist", "read_idx"]

NAMES = ("mnist", "digits", "auto")  # anything else is a folder of pictures
DIGITS = tuple("0123456789")

# The published files: SHA-256 of the uncompressed content, MD5 of the .gz that the mirrors hold.
_FILES = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "d53e105ee54ea40749a09fcbcd1e9432",
    ),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "9fb629c4189551a2d022fa330f9573f3",
    ),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
}


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32 in [0, 1], and their classes (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, over all images and pixels."""
        # By NumPy, whose sums are the same bits for any number of threads.
        channels = self.images.transpose(0, 1).flatten(1).numpy()
        mean, std = (f(channels, axis=1, dtype=np.float64) for f in (np.mean, np.std))
        return tuple(mean.tolist()), tuple(std.tolist())


@dataclass(frozen=True)
class Dataset:
    """A data set with the split that it is judged by.

    Attributes:
        name: "mnist", "digits" or the path of a folder of pictures.
        train, valid: what is trained on, and what accuracy is measured on.
        source: where it was read from, for people.
        note: one line for people, where this is not the data set they would expect.
        classes: their names; a label is a place among them.
        content: a hash of a folder's pictures and classes; the other data sets never change.
    """

    name: str
    train: Split
    valid: Split
    source: str
    note: str | None = None
    classes: tuple[str, ...] = DIGITS
    content: str | None = None


def load_data(
    name: str = "auto",
    folder: str | Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    colour: bool | None = None,
) -> Dataset:
    """Loads a data set by name.

    Args:
        name: "mnist", "digits", or "auto": MNIST where it can be had, else digits, with a
            note that says why. Any other name is the path of a folder of pictures.
        folder: where the MNIST files lie; see `load_mnist`. The others need none.
        image_size, colour: of a folder of pictures; see `load_image_folder`.

    Raises:
        DataError: it can't be had. "auto" falls back only where MNIST is nowhere to be found:
            a folder that was named and lacks the files, or a file that is broken, is an error
            for it too, since falling back would hide a mistake.
    """
    if name not in NAMES:
        from convext.mnist.image_folder import load_image_folder

        if not Path(name).expanduser().exists():
            raise DataError(f"--data {name!r}: no such folder, and none of {', '.join(NAMES)}")
        if folder is not None:
            raise DataError("--data-dir is where the MNIST files lie, and --data a folder itself")
        return load_image_folder(name, image_size, colour)
    for option, value in (("--image-size", image_size), ("--colour", colour)):
        if value is not None:
            raise DataError(f"{option} is for a folder of pictures, but --data is {name}")
    if name == "mnist":
        return load_mnist(folder)
    if name == "digits":
        if folder is not None:
            raise DataError(f"{folder}: digits are read from scikit-learn, not from a folder")
        return load_digits()
    place = _named_folder(folder)
    if place is None:
        try:
            place = _cached_folder()
        except DataError as error:
            return load_digits(note=f"Falling back to digits, for MNIST can't be had: {error}")
    return _read_mnist(place)


def load_mnist(folder: str | Path | None = None) -> Dataset:
    """Loads MNIST: 60,000 images to train on, the 10,000 test images to validate with.

    The four files, each as .gz or plain, are looked for in `folder`, else in $CONVEXT_DATA,
    else in the user's cache, into which they are downloaded if need be. Each is checked
    against the SHA-256 of its published content.

    Raises:
        DataError: naming the file or the folder, and the reason.
    """
    return _read_mnist(_named_folder(folder) or _cached_folder())


def load_digits(note: str | None = None) -> Dataset:
    """Loads scikit-learn's 1,797 digits of 8x8 pixels, brought to MNIST's 28x28.

    They come with scikit-learn, so that this works at once and without a network. A fifth,
    the same on every machine, is kept for validation.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        reason = "digits need scikit-learn: pip install 'convext[digits]'"
        raise DataError(f"{note}; and {reason}" if note else reason) from error

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # grey 0 to 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, valid = order[len(order) // 5 :], order[: len(order) // 5]
    return Dataset(
        name="digits",
        train=Split(images[train], labels[train]),
        valid=Split(images[valid], labels[valid]),
        source="scikit-learn, 8x8 brought to 28x28",
        note=note,
    )


def _find(folder: Path, name: str) -> Path | None:
    """The file in the folder, compressed or plain."""
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)


def _named_folder(folder: str | Path | None) -> Path | None:
    """The folder that the user named, if any; it must hold the files."""
    label = "--data-dir"
    if folder is None:
        folder, label = os.environ.get("CONVEXT_DATA") or None, "CONVEXT_DATA"
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise DataError(f"{label}: {folder}: no such folder")
    if not folder.is_dir():
        raise DataError(f"{label}: {folder}: not a folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{label}: {folder}: permission denied")
    for name in _FILES:
        if _find(folder, name) is None:
            raise DataError(f"{label}: {folder}: holds neither {name}.gz nor {name}")
    return folder


def _cached_folder() -> Path:
    """The folder in this user's cache, filled by a download where it is not yet full."""
    from convext.mnist import download

    folder = download.cache_folder() / "mnist"
    archives = {f"{name}.gz": f"md5:{md5}" for name, (_, md5) in _FILES.items()}
    download.download(archives, folder, download.MIRRORS)
    return folder


def _read_mnist(folder: Path) -> Dataset:
    splits = []
    for part in ("train", "t10k"):
        images = _read(folder, f"{part}-images-idx3-ubyte")
        labels = _read(folder, f"{part}-labels-idx1-ubyte")
        splits.append(Split(images.unsqueeze(1).float().div_(255), labels.long()))
    return Dataset("mnist", splits[0], splits[1], source=str(folder))


def _read(folder: Path, name: str) -> torch.Tensor:
    path = _find(folder, name)
    assert path is not None  # whoever chose the folder has looked
    return read_idx(path, sha256=_FILES[name][0])
