"""torch.compile of one layer at a time: a whole graph each, and eager's output and gradients."""

import copy

import pytest
import torch

from convext import BatchNorm2d, Conv2d, functional

CONV = {
    "plain": lambda: Conv2d(3, 4, (3, 2)),
    "settings": lambda: Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2, algorithm="im2col"),
    "depthwise": lambda: Conv2d(3, 6, (2, 3), padding=(0, 1), groups=3, bias=False),
    "same": lambda: Conv2d(3, 4, (3, 2), padding="same", dilation=(2, 3)),
    "valid": lambda: Conv2d(3, 4, (3, 2), (1, 2), padding="valid"),
    "reflect": lambda: Conv2d(3, 4, (3, 2), padding=(2, 1), padding_mode="reflect"),
    "replicate": lambda: Conv2d(3, 4, (3, 2), (2, 1), padding=(1, 2), padding_mode="replicate"),
    "circular": lambda: Conv2d(3, 4, (3, 2), padding="same", padding_mode="circular"),
    "channels_last": lambda: Conv2d(3, 4, (3, 2), padding=1).to(memory_format=torch.channels_last),
}
NORM = {
    "train": lambda: BatchNorm2d(3, momentum=0.3),
    "average": lambda: BatchNorm2d(3, momentum=None),  # nn.BatchNorm2d breaks the graph here
    "eval": lambda: BatchNorm2d(3).eval(),
    "plain": lambda: BatchNorm2d(3, affine=False, track_running_stats=False).eval(),
}
LAYERS = {f"Conv2d {name}": make for name, make in CONV.items()}
LAYERS |= {f"BatchNorm2d {name}": make for name, make in NORM.items()}
INDUCTOR = ("Conv2d settings", "BatchNorm2d train")


def step(layer, call, x):
    """Output, the gradients of input and parameters, and the buffers that are left."""
    output = call(x)
    gradients = torch.autograd.grad(output.cos().sum(), [x, *layer.parameters()])
    return [output, *gradients, *layer.buffers()]


def check(layer, inputs, **options):
    torch._dynamo.reset()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, **options)
    for x in inputs:
        expected, got = step(layer, layer, x), step(twin, compiled, x)
        torch.testing.assert_close(got, expected)
        assert [t.stride() for t in got[:2]] == [t.stride() for t in expected[:2]]


def pictures(name, *sizes):
    channels = 4 if name == "Conv2d settings" else 3
    for batch, *size in sizes:
        yield torch.randn(*batch, channels, *size, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_as_symbols(name):
    layer = LAYERS[name]().double()
    check(layer, pictures(name, ((2,), 7, 6), ((5,), 8, 11)), backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("name", ["Conv2d settings", "Conv2d same", *list(LAYERS)[-4:]])
def test_sizes_as_numbers(name):
    layer = LAYERS[name]().double()
    check(layer, pictures(name, ((2,), 7, 6)), backend="aot_eager", dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(name):
    layer = LAYERS[name]().double()
    check(layer, pictures(name, ((2,), 7, 6), ((2,), 8, 11)))


@pytest.mark.parametrize("name", ["Conv2d settings", "Conv2d circular"])
def test_single_picture(name):
    layer = LAYERS[name]().double()
    check(layer, pictures(name, ((), 7, 6), ((), 8, 11)), backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("padding", ["same", (1, 2)], ids=str)
def test_kernel_of_any_size(padding):
    """Where the weight is an argument its sizes are symbols too."""
    torch._dynamo.reset()
    compiled = torch.compile(functional.conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for kernel in ((3, 2), (2, 5)):
        x, w = torch.randn(2, 3, 7, 9), torch.randn(4, 3, *kernel)
        expected = functional.conv2d(x, w, padding=padding)
        torch.testing.assert_close(compiled(x, w, padding=padding), expected)
