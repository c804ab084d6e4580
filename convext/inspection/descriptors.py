"""Descriptors: functions from images to vectors of features that people thought of.

What they are good for, `convext.inspection.features` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

# HOG's, in pixels and cells: seven by seven cells on an image of 28x28.
ORIENTATIONS, CELL, BLOCK = 9, 4, 2
# SIFT and ORB describe the surroundings of points; these lie on a grid of so many by so many, as
# nobody has to find them: a digit is in the middle of its image.
POINTS = 3
SIFT_WINDOW = 16  # pixels: four by four histograms, each of 4x4 pixels, as in Lowe's paper
ORB_PATCH = 31  # pixels, OpenCV's; the image is doubled, so that they span half of one of 28x28
ORB_SCALE = 2


def raw_pixels(images: torch.Tensor) -> np.ndarray:
    """The baseline: each pixel is a feature.

    Args:
        images: (N, 1, H, W), float32 in [0, 1].

    Returns:
        (N, H * W), float32 in [0, 1].

    Raises:
        ValueError: images of another shape, dtype or range.
    """
    planes = planes_of(images)
    return planes.reshape(len(planes), math.prod(planes.shape[1:])).copy()


def hog(images: torch.Tensor) -> np.ndarray:
    """Histograms of oriented gradients (Dalal & Triggs 2005), by scikit-image.

    Which way does brightness change, and how much? In each cell of 4x4 pixels a histogram over 9
    directions, opposite ones being the same; each block of 2x2 cells, overlapping, is normalised
    (L2-Hys), so that contrast matters little.

    Args:
        images: (N, 1, H, W), float32 in [0, 1], of at least 8x8 pixels.

    Returns:
        (N, D), float32 in [0, 1]: D is 6 * 6 blocks * 4 cells * 9 directions = 1,296 for 28x28.

    Raises:
        ValueError: images of another shape, dtype or range.
    """
    planes = planes_of(images, smallest=CELL * BLOCK)
    rows, columns = (size // CELL - BLOCK + 1 for size in planes.shape[1:])
    found = np.empty((len(planes), rows * columns * BLOCK**2 * ORIENTATIONS), np.float32)
    for row, plane in zip(found, planes, strict=True):
        row[:] = _hog_blocks(plane).ravel()
    return found


def hog_cells(image: torch.Tensor) -> np.ndarray:
    """What `hog` says of each cell of one image, averaged over the blocks that the cell is in.

    Args:
        image: (1, H, W), float32 in [0, 1], of at least 8x8 pixels.

    Returns:
        (rows, columns, 9), floats: of direction number n, brightness changes most at an angle of
        (n + 0.5) * 20 degrees from the x axis towards the y axis, which points down.

    Raises:
        ValueError: an image of another shape, dtype or range.
    """
    blocks = _hog_blocks(planes_of(image[None], smallest=CELL * BLOCK)[0])
    rows, columns = blocks.shape[0] + BLOCK - 1, blocks.shape[1] + BLOCK - 1
    total, number = np.zeros((rows, columns, ORIENTATIONS)), np.zeros((rows, columns, 1))
    for row, column in np.ndindex(BLOCK, BLOCK):
        part = np.s_[row : row + blocks.shape[0], column : column + blocks.shape[1]]
        total[part] += blocks[:, :, row, column]
        number[part] += 1
    return total / number


def sift(images: torch.Tensor) -> np.ndarray:
    """SIFT's descriptors (Lowe 2004) at `grid_points`, by OpenCV.

    Around each point 4x4 histograms of 4x4 pixels, over 8 directions of which opposite ones
    differ; a pixel counts for the nearest cells, so that those two pixels around them count too.
    Neither is the point searched for nor its window turned or scaled, which SIFT does to
    find an object again: digits are upright and of one size, and a 6 is no 9.

    Args:
        images: (N, 1, H, W), float32 in [0, 1].

    Returns:
        (N, D), float32 in [0, 1]: D is 9 points * 16 histograms * 8 directions = 1,152.

    Raises:
        ValueError: images of another shape, dtype or range.
    """
    import cv2

    planes = _bytes(images)
    # OpenCV's histogram is 3/2 of a point's size wide. Its blur, 0.8 where the paper has 1.6 for
    # an image that was doubled, keeps the strokes of small digits.
    points = _keypoints(planes, size=SIFT_WINDOW / 4 * 2 / 3)
    method = cv2.SIFT_create(sigma=0.8)
    found = np.empty((len(planes), len(points) * 128), np.float32)
    for row, plane in zip(found, planes, strict=True):
        row[:] = method.compute(plane, points)[1].ravel()
    return found / 512  # OpenCV's unit


def orb(images: torch.Tensor) -> np.ndarray:
    """ORB's descriptors (Rublee et al. 2011) at `grid_points`, by OpenCV.

    Of the patch around each point 256 questions: is this pixel darker than that one? Which pairs
    of pixels, the authors learned from photographs. Points are not searched for, nor patches
    turned; see `sift`.

    Args:
        images: (N, 1, H, W), float32 in [0, 1].

    Returns:
        (N, D), float32, each 0 or 1: D is 9 points * 256 = 2,304.

    Raises:
        ValueError: images of another shape, dtype or range.
    """
    import cv2

    planes = _bytes(images)
    # The patch of a point near the border reaches beyond it: into black, here.
    points = _keypoints(planes, size=ORB_PATCH, scale=ORB_SCALE, border=ORB_PATCH)
    size = [n * ORB_SCALE for n in planes.shape[:0:-1]]
    border = (*[ORB_PATCH] * 4, cv2.BORDER_CONSTANT)
    method = cv2.ORB_create(nlevels=1, patchSize=ORB_PATCH, edgeThreshold=0)
    found = np.empty((len(planes), len(points) * 256), np.float32)
    for row, plane in zip(found, planes, strict=True):
        large = cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)
        bits = method.compute(cv2.copyMakeBorder(large, *border), points)[1]
        row[:] = np.unpackbits(bits.ravel())
    return found


DESCRIPTORS: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
    "raw pixels": raw_pixels,
    "HOG": hog,
    "SIFT": sift,
    "ORB": orb,
}


def grid_points(height: int, width: int) -> list[tuple[float, float]]:
    """Where `sift` and `orb` look: three by three points (x, y) in pixels, from top left.

    The image is cut into as many equal rectangles; these are their middles, where pixel (0, 0)
    has its middle at (0, 0).
    """
    xs, ys = (
        [(number + 0.5) * size / POINTS - 0.5 for number in range(POINTS)]
        for size in (width, height)
    )
    return [(x, y) for y in ys for x in xs]


def _hog_blocks(plane: np.ndarray) -> np.ndarray:
    """(rows, columns, 2, 2, 9): the histograms of the cells of each block."""
    from skimage import feature

    return feature.hog(
        plane, ORIENTATIONS, (CELL, CELL), (BLOCK, BLOCK), "L2-Hys", feature_vector=False
    )


def planes_of(images: torch.Tensor, smallest: int = 1) -> np.ndarray:
    """The images as an array (N, H, W), looked at first."""
    if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < smallest:
        least = f" of at least {smallest}x{smallest} pixels" if smallest > 1 else ""
        raise ValueError(f"images must be of shape (N, 1, H, W){least}, got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise ValueError(f"images must be float32, got {images.dtype}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images must be in [0, 1], got {low:g} to {high:g}")
    return images[:, 0].numpy()


def _bytes(images: torch.Tensor) -> np.ndarray:
    """OpenCV's descriptors take whole numbers up to 255."""
    return np.rint(planes_of(images) * 255).astype(np.uint8)


def _keypoints(planes: np.ndarray, size: float, scale: int = 1, border: int = 0) -> list:
    """The grid's points for OpenCV, upright, on images enlarged and with a border."""
    import cv2

    points = grid_points(*(n * scale for n in planes.shape[1:]))
    return [cv2.KeyPoint(x + border, y + border, size, 0.0) for x, y in points]
