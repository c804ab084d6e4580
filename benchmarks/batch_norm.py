"""Batch norm after each of the lesson's layers, beside PyTorch's.

python benchmarks/batch_norm.py          a Markdown table
"""

import common
import pytest
import torch
from problems import LESSON_LAYERS

from convext import functional

BATCHES = (64, 512)


def calls(size: tuple[int, ...], what: str):
    """Our call and PyTorch's; "step" is training forward and backward, through autograd."""
    channels = size[1]
    input = torch.randn(size, requires_grad=what == "step")
    weight, bias = (torch.ones(channels, requires_grad=what == "step") for _ in range(2))
    statistics = torch.zeros(channels), torch.ones(channels)
    grad = torch.randn(size)

    def call(batch_norm):
        output = batch_norm(input, *statistics, weight, bias, training=what != "eval")
        if what == "step":
            torch.autograd.grad(output, (input, weight, bias), grad)

    return lambda: call(functional.batch_norm), lambda: call(torch.nn.functional.batch_norm)


def cases() -> list[common.Case]:
    sizes = [
        (f"after {layer.name}, batch {batch}", (batch, *layer.output_size[1:]))
        for batch in BATCHES
        for layer in LESSON_LAYERS[:-1]
    ]
    return [
        common.Case(f"{name}, {what}", "ours", lambda size=size, what=what: calls(size, what))
        for name, size in [*sizes, ("8 x 64 x 56 x 56", (8, 64, 56, 56))]
        for what in ("eval", "train", "step")
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_batch_norm(benchmark, request, case):
    common.run(benchmark, request, case)


if __name__ == "__main__":
    common.markdown(cases(), "Batch norm, float32")
