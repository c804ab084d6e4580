"""The Hough transform: points vote for the lines that they may lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HoughLine:
    """The line of the points with x * cos(angle) + y * sin(angle) = distance.

    Attributes:
        angle: of its normal, in radians, from the x axis towards the y axis, which points down.
        distance: from pixel (0, 0), in pixels; negative to the other side.
        votes: how many points lie on it, to the nearest pixel.
    """

    angle: float
    distance: float
    votes: int

    def __str__(self) -> str:
        return f"{np.degrees(self.angle):6.1f} degrees  {self.distance:6.1f} px  {self.votes} votes"


@dataclass(frozen=True, eq=False)
class HoughLines:
    """What `hough_demo` found. `print` lists the lines.

    Attributes:
        image: (H, W), float32 in [0, 1].
        points: (H, W), bool: those that vote.
        votes: (distances, angles), int: the accumulator.
        distances: of its rows, in pixels.
        angles: of its columns, in radians.
        lines: with the most votes first.
    """

    image: np.ndarray
    points: np.ndarray
    votes: np.ndarray
    distances: np.ndarray
    angles: np.ndarray
    lines: tuple[HoughLine, ...]

    def __str__(self) -> str:
        count = f"{self.points.sum()} points vote; lines: normal's angle, distance, votes"
        return "\n".join([count, *map(str, self.lines)])

    def plot(self) -> Figure:
        """Draws the image with the points and lines, and the accumulator with the peaks."""
        from convext.inspection.drawing import new_figure

        figure, axes = new_figure(1, 2, (7.5, 3.6))
        self.draw_lines(axes[0, 0])
        self.draw_votes(axes[0, 1])
        return figure

    def draw_lines(self, axes: Axes) -> None:
        """Draws the image, the points that vote, and the lines."""
        from convext.inspection.drawing import COLORS, HIGHLIGHT, image

        image(axes, self.image, "Hough: points and lines")
        axes.autoscale(False)
        rows, columns = self.points.nonzero()
        axes.plot(columns, rows, ".", color=COLORS[1], markersize=4)
        for line in self.lines:
            normal = np.array([np.cos(line.angle), np.sin(line.angle)])
            foot = line.distance * normal
            axes.axline(foot, foot + normal[::-1] * (-1, 1), color=HIGHLIGHT, linewidth=1.5)

    def draw_votes(self, axes: Axes) -> None:
        """Draws the accumulator, and a circle around each line's cell."""
        from convext.inspection.drawing import GREYS, HIGHLIGHT

        degrees = np.degrees(self.angles)
        low, high = self.distances[[0, -1]]
        axes.imshow(
            self.votes,
            cmap=GREYS,
            aspect="auto",
            interpolation="nearest",
            extent=(degrees[0], degrees[-1], high, low),
        )
        for line in self.lines:
            axes.plot(
                np.degrees(line.angle),
                line.distance,
                "o",
                mfc="none",
                mec=HIGHLIGHT,
                ms=9,
                clip_on=False,
            )
        axes.set_title("Hough: votes for each line", fontsize=9)
        axes.set_xlabel("angle of the normal, degrees", fontsize=8)
        axes.set_ylabel("distance, pixels", fontsize=8)
        axes.set_xticks([-90, -45, 0, 45, 90])
        axes.tick_params(labelsize=7)


def hough_demo(image: torch.Tensor, most: int = 3) -> HoughLines:
    """Finds straight strokes by the Hough transform (Duda & Hart 1972), by scikit-image.

    The strokes (brighter than a half) are thinned to one pixel. Each pixel left votes for the lines
    through it, one for each of 180 angles; a line with at least half the votes of the best one,
    and not next to a better one, is found.

    Args:
        image: (1, H, W), float32 in [0, 1].
        most: how many lines at most.

    Raises:
        ValueError: an image of another shape, or `most` below 1.
    """
    from skimage.morphology import skeletonize
    from skimage.transform import hough_line, hough_line_peaks

    if image.dim() != 3 or len(image) != 1:
        raise ValueError(f"image must be of shape (1, H, W), got {tuple(image.shape)}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    plane = image[0].numpy()
    points = skeletonize(plane > 0.5)
    angles = np.linspace(-np.pi / 2, np.pi / 2, 180, endpoint=False)
    votes, angles, distances = hough_line(points, angles)
    peaks = ()
    if points.any():
        found = hough_line_peaks(
            votes, angles, distances, min_distance=3, min_angle=20, num_peaks=most
        )
        peaks = zip(*found, strict=True)
    lines = tuple(HoughLine(float(a), float(d), int(v)) for v, a, d in peaks)
    return HoughLines(plane, points, votes.astype(np.int64), distances, angles, lines)
