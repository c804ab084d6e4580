"""What is measured: the convolutions of networks that people train, each with its count.

A network is written down as its papers have it, layer by layer; `distinct` makes the list that is
measured. Parts are what goals.py sets its goals for.
"""

from collections import Counter
from dataclasses import dataclass

from convext.bench.problem import Conv2dProblem
from convext.mnist.model import CONVOLUTIONS


@dataclass(frozen=True)
class Layer:
    """A convolution, in which part of its group it belongs and how often the network has it."""

    problem: Conv2dProblem
    part: str
    count: int = 1


def conv(
    batch: int, inputs: int, size: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> Conv2dProblem:
    """A square one, padded so that stride 1 keeps the size; named by what it is."""
    channels = f"{inputs} to {outputs}" if groups == 1 else f"{inputs} depthwise"
    return Conv2dProblem(
        f"{kernel}x{kernel}{f' s{stride}' if stride > 1 else ''}, {channels} at {size}x{size}",
        *(batch, inputs, size, size, outputs),
        *((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2)),
        groups=groups,
    )


def lesson(batch: int) -> list[Conv2dProblem]:
    """The lesson's network for MNIST (fastbook, chapter 13), which halves 28x28 down to 1x1."""
    layers, size = [], 28
    for inputs, outputs, kernel in CONVOLUTIONS:
        layers.append(conv(batch, inputs, size, outputs, kernel, 2))
        size = layers[-1].output_size[2]
    return layers


def resnet50(batch: int) -> list[Conv2dProblem]:
    """He et al., "Deep Residual Learning for Image Recognition", 2015, table 1, with the strides
    in the 3x3 as torchvision has them.
    """
    layers = [conv(batch, 3, 224, 64, 7, 2)]
    inputs, size = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            layers += [
                conv(batch, inputs, size, width, 1),
                conv(batch, width, size, width, 3, stride),
                conv(batch, width, size // stride, 4 * width, 1),
            ]
            if block == 0:
                layers.append(conv(batch, inputs, size, 4 * width, 1, stride))
            inputs, size = 4 * width, size // stride
    return layers


def vgg16(batch: int) -> list[Conv2dProblem]:
    """Simonyan and Zisserman, "Very Deep Convolutional Networks ...", 2014, configuration D."""
    layers, inputs, size = [], 3, 224
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(conv(batch, inputs, size, width, 3))
            inputs = width
        size //= 2
    return layers


def mobilenet_v2(batch: int) -> list[Conv2dProblem]:
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2."""
    layers = [conv(batch, 3, 224, 32, 3, 2)]
    inputs, size = 32, 112
    for expansion, outputs, blocks, first_stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for block in range(blocks):
            stride, width = first_stride if block == 0 else 1, inputs * expansion
            if expansion > 1:
                layers.append(conv(batch, inputs, size, width, 1))
            layers.append(conv(batch, width, size, width, 3, stride, groups=width))
            size //= stride
            layers.append(conv(batch, width, size, outputs, 1))
            inputs = outputs
    return [*layers, conv(batch, inputs, size, 1280, 1)]


def distinct(network: list[Conv2dProblem]) -> list[Layer]:
    """Each different layer once, in the order of the network."""
    return [Layer(problem, part(problem), count) for problem, count in Counter(network).items()]


WINOGRAD_LARGE = "3x3 stride 1 at 28x28 and above"
WINOGRAD_SMALL = "3x3 stride 1 at 14x14"


def part(p: Conv2dProblem) -> str:
    """What kind of layer of a large network this is."""
    if p.C == 3:
        return "3 input channels"
    if p.groups > 1:
        return "depthwise"
    if p.kernel == (3, 3) and p.stride == (1, 1) and p.H >= 14:
        return WINOGRAD_LARGE if p.H >= 28 else WINOGRAD_SMALL
    return "1x1" if p.kernel == (1, 1) else "strided or small"


# Images in a batch of the large networks, unless said otherwise: what fits a minute or two.
BATCHES = {"resnet50": 4, "vgg16": 2, "mobilenet": 4}
NETWORKS = {"resnet50": resnet50, "vgg16": vgg16, "mobilenet": mobilenet_v2}
LESSON_BATCHES = (1, 64, 512)

# (channels, size) of maps that batch norm meets besides the lesson's, at batches of 8 and 512.
NORM_SIZES = ((8, 64, 56, 56), (8, 256, 14, 14), (8, 512, 7, 7), (512, 64, 1, 1))
