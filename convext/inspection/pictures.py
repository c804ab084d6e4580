"""Pictures as tensors: from a file, or one of the samples that scikit-image brings along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# Of skimage.data, those that its package contains, so that nothing is downloaded.
SAMPLES = (
    *("astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel"),
    *("moon", "page", "rocket", "text"),
)


def sample(name: str) -> Tensor:
    """One of scikit-image's sample pictures.

    Args:
        name: one of SAMPLES.

    Returns:
        (C, H, W), float32 in [0, 1]; C is 1 for a grey picture, 3 for red, green and blue.

    Raises:
        ValueError: there is no such sample.
    """
    if name not in SAMPLES:
        raise ValueError(f"name must be one of {', '.join(SAMPLES)}, got {name!r}")
    from skimage import data

    return _from_bytes(getattr(data, name)())


def read_picture(path: str | Path) -> Tensor:
    """A picture from a file of any format that Pillow reads, upright; transparency is left out.

    Returns:
        As `sample`.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no picture, or one with other than 8 bits a channel.
    """
    import numpy as np

    return _from_bytes(np.array(open_picture(path)))


def open_picture(path: str | Path) -> Image.Image:
    """As `read_picture`, still Pillow's: of mode L where the file is grey, else RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{path}: 8 bits a channel are read, not mode {picture.mode}")
            mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
            return ImageOps.exif_transpose(picture).convert(mode)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that Pillow can read") from error


def _from_bytes(pixels) -> Tensor:
    """(H, W) or (H, W, 3) of uint8."""
    image = torch.from_numpy(pixels).float() / 255
    return image[None] if image.dim() == 2 else image.permute(2, 0, 1).contiguous()
