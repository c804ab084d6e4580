"""The lesson's network with one thing or another changed, for experiments."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

import convext
from convext.algorithms import check_algorithm_name
from convext.mnist.model import Normalize

GROUPS = 4  # of group norm: two channels each in the first layer, sixteen in the last

# Each makes a norm of so many channels with a factor and an offset for each, gamma and beta.
NORMS = {
    "batch": nn.BatchNorm2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(GROUPS, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    # Instance norm again, by a layer that does not refuse maps of 1x1.
    "channel": lambda channels: nn.GroupNorm(channels, channels),
}


@dataclass(frozen=True)
class Network:
    """A plan of the lesson's network. As it stands it makes what `lesson_cnn` makes, bit for bit.

    Attributes:
        layers: "convext" or "torch", of the convolutions and batch norms.
        algorithm: of convext's convolutions.
        first_kernel: size of the first convolution's kernel, odd; the others' is 3.
        widths: out_channels of each convolution but the last, which has one for each class.
        norm: a name of NORMS.
        after: what follows each convolution but the last, of "relu" and "norm".
        last: what follows the last one, likewise.
        classes: how many there are.
        normalize: as `lesson_cnn` takes it.

    Raises:
        ValueError: a value other than these.
    """

    layers: str = "convext"
    algorithm: str = "auto"
    first_kernel: int = 5
    widths: tuple[int, ...] = (8, 16, 32, 64)
    norm: str = "batch"
    after: tuple[str, ...] = ("relu", "norm")
    last: tuple[str, ...] = ()
    classes: int = 10
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if self.layers not in ("convext", "torch"):
            raise ValueError(f"layers must be 'convext' or 'torch', got {self.layers!r}")
        check_algorithm_name(self.algorithm)
        if self.layers == "torch" and self.algorithm != "auto":
            raise ValueError(f"algorithm={self.algorithm!r} needs layers='convext'")
        if self.first_kernel < 1 or self.first_kernel % 2 == 0:
            raise ValueError(f"first_kernel must be odd and above 0, got {self.first_kernel}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        for name in ("after", "last"):
            if not set(getattr(self, name)) <= {"relu", "norm"}:
                raise ValueError(
                    f"{name} must be of 'relu' and 'norm', got {getattr(self, name)!r}"
                )

    def build(self) -> nn.Sequential:
        """Makes the network, initialised from torch's global generator.

        Returns:
            A module from (N, 1, 28, 28) to class scores (N, classes). Each convolution halves the
            grid: 28, 14, 7, 4, 2, 1.
        """
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        if self.normalize is not None:
            modules["normalize"] = Normalize(*self.normalize)
        channels = (1, *self.widths, self.classes)
        for number in range(1, len(channels)):
            inputs, outputs = channels[number - 1 : number + 1]
            size = self.first_kernel if number == 1 else 3
            modules[f"conv{number}"] = nn.Conv2d(inputs, outputs, size, stride=2, padding=size // 2)
            for kind in self.after if number < len(channels) - 1 else self.last:
                module = nn.ReLU() if kind == "relu" else NORMS[self.norm](outputs)
                modules[f"{kind}{number}"] = module
        modules["flatten"] = nn.Flatten()
        model = nn.Sequential(modules)
        if self.layers == "convext":
            convext.replace_layers(model)
            for module in model:
                if isinstance(module, convext.Conv2d):
                    module.algorithm = self.algorithm
        return model
