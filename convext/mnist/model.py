"""The lesson's network: five stride-2 convolutions that take a 28x28 digit to ten numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# (in_channels, out_channels, kernel_size) of each convolution. The first kernel is 5x5, since
# a 3x3 one would compute 8 numbers from only 9 pixels.
CONVOLUTIONS = ((1, 8, 5), (8, 16, 3), (16, 32, 3), (32, 64, 3), (64, 10, 3))
LARGEST_SIZE = 2 ** len(CONVOLUTIONS)  # the height or width that they still take to 1


class Normalize(nn.Module):
    """(x - mean) / std for each channel, as the book's DataBlock normalises its batches.

    A layer of the network, so that whoever runs it gives it images as they are, in [0, 1].

    Args:
        mean, std: of the training images' channels; a std of 0 (all pixels the same) counts as 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor([s or 1.0 for s in std]).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def lesson_cnn(
    layers: str = "convext",
    algorithm: str = "auto",
    *,
    in_channels: int = 1,
    classes: int = 10,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Sequential:
    """Builds the network, initialised from torch's global generator.

    Each convolution has stride 2 and padding kernel_size // 2, so that it halves the grid
    (28, 14, 7, 4, 2, 1) while channels double; ReLU and then batch normalisation follow each
    but the last. Both kinds of layers draw the same initial weights from the same seed, and
    their state_dicts have the same keys.

    Args:
        layers: "convext" for this package's layers, "torch" for stock ones.
        algorithm: for convext's convolutions; see `convext.algorithms`.
        in_channels: of the images: 1 for grey ones, 3 for colour.
        classes: how many scores the last convolution puts out.
        normalize: mean and std of each channel, by which the first layer normalises images; with
            None there is no such layer.

    Returns:
        A module from (N, in_channels, H, W) to class scores (N, classes). H and W are 28 in the
        lesson; any from 1 to 32 end in 1x1, so that flattening leaves one score per class.

    Raises:
        ValueError: unknown `layers`, an algorithm named for stock layers, or a number below 1.
    """
    for name, value in (("in_channels", in_channels), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if layers == "convext":
        import convext

        conv_type, norm_type = convext.Conv2d, convext.BatchNorm2d
        options = {"algorithm": algorithm}
    elif layers == "torch":
        if algorithm != "auto":
            raise ValueError(f"algorithm={algorithm!r} needs layers='convext', got layers='torch'")
        conv_type, norm_type, options = nn.Conv2d, nn.BatchNorm2d, {}
    else:
        raise ValueError(f"layers must be 'convext' or 'torch', got {layers!r}")

    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if normalize is not None:
        modules["normalize"] = Normalize(*normalize)
    for number, (inputs, outputs, size) in enumerate(CONVOLUTIONS, start=1):
        if number == 1:
            inputs = in_channels
        if number == len(CONVOLUTIONS):
            outputs = classes
        modules[f"conv{number}"] = conv_type(
            inputs, outputs, size, stride=2, padding=size // 2, **options
        )
        if number < len(CONVOLUTIONS):
            modules[f"relu{number}"] = nn.ReLU()
            modules[f"norm{number}"] = norm_type(outputs)
    modules["flatten"] = nn.Flatten()
    return nn.Sequential(modules)
