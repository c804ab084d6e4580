"""The lesson's blocks (convolution, ReLU, batch norm), fused and as our separate layers, beside
PyTorch's three.

python benchmarks/conv_block.py          a Markdown table
"""

from dataclasses import replace

import common
import pytest
import torch
from problems import LESSON_LAYERS, Conv2dProblem
from torch import nn

import convext

BATCHES = (64, 512)
# Inference, the forward pass of training, and the same with the backward pass.
WHAT = ("eval", "forward", "forward and backward")


def stock_layers(layer: Conv2dProblem, order: str) -> nn.Sequential:
    conv = nn.Conv2d(layer.C, layer.O, layer.kernel, layer.stride, layer.padding)
    norm, relu = nn.BatchNorm2d(layer.O), nn.ReLU()
    return nn.Sequential(conv, *((relu, norm) if order == "conv-relu-norm" else (norm, relu)))


def calls(layer: Conv2dProblem, name: str, order: str, what: str):
    """Our call and PyTorch's, with autograd where gradients are computed."""
    stock = stock_layers(layer, order)
    parts = convext.replace_layers(stock_layers(layer, order))
    ours = convext.fuse(parts) if name == "fused" else parts
    x = torch.randn(layer.input_size, requires_grad=what == "forward and backward")
    grad = torch.randn(layer.output_size)

    def call(model: nn.Module):
        model.train(what != "eval")
        parameters = [x, *model.parameters()]

        def backward():
            torch.autograd.grad(model(x), parameters, grad)

        def forward():
            with torch.set_grad_enabled(what == "forward"):
                model(x)

        return backward if what == "forward and backward" else forward

    return call(ours), call(stock)


def cases() -> list[common.Case]:
    layers = [replace(layer, N=batch) for batch in BATCHES for layer in LESSON_LAYERS[:-1]]
    return [
        common.Case(
            f"{layer.name}, batch {layer.N}, {order}, {what}",
            name,
            lambda arguments=(layer, name, order, what): calls(*arguments),
        )
        for order in ("conv-relu-norm", "conv-norm-relu")
        for layer in layers
        for what in WHAT
        for name in ("fused", "separate")
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_conv_block(benchmark, request, case):
    common.run(benchmark, request, case)


if __name__ == "__main__":
    common.markdown(cases(), "Blocks, float32")
