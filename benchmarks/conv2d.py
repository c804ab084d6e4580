"""The convolutions: every layer and pass by every algorithm, beside PyTorch's.

make bench ARGS="-k 'layer 2' --threads 2"
python benchmarks/conv2d.py              a Markdown table
"""

from dataclasses import replace

import common
import pytest
import torch
from problems import LARGE_LAYERS, LESSON_LAYERS, Conv2dProblem
from reference import PASSES, operands

import convext

BATCHES = (64, 512)


def calls(problem: Conv2dProblem, conv_pass: str, algorithm: str):
    """Our call and PyTorch's for one pass, at the same level: one op, without autograd."""
    x, w, b, g = operands(problem, torch.float32)
    stride, padding, dilation, groups = settings = problem.settings
    ops = torch.ops.convext

    def torch_backward():
        return torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, [0, 0], groups,
            [conv_pass == "grad_input", conv_pass == "grad_weight", False],
        )  # fmt: skip

    if conv_pass == "forward":
        return (
            lambda: ops.conv2d(x, w, b, *settings, algorithm),
            lambda: torch.conv2d(x, w, b, *settings),
        )
    if conv_pass == "grad_input":
        size = problem.input_size
        ours = lambda: ops.conv2d_backward_input(g, w, size, *settings, algorithm)  # noqa: E731
    else:
        size = problem.weight_size
        ours = lambda: ops.conv2d_backward_weight(g, x, size, *settings, algorithm)  # noqa: E731
    return ours, torch_backward


def cases() -> list[common.Case]:
    layers = [replace(layer, N=batch) for batch in BATCHES for layer in LESSON_LAYERS]
    return [
        common.Case(
            f"{layer.name}, batch {layer.N}, {conv_pass}",
            algorithm,
            lambda layer=layer, conv_pass=conv_pass, name=algorithm: calls(layer, conv_pass, name),
        )
        for layer in [*layers, *LARGE_LAYERS]
        for conv_pass in PASSES
        for algorithm in convext.algorithms()
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_conv2d(benchmark, request, case):
    common.run(benchmark, request, case)


if __name__ == "__main__":
    common.markdown(cases(), "Convolution, float32")
