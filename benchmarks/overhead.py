"""What a call costs besides its arithmetic: one convolution of a 1x1x4x4 input, beside PyTorch's.

python benchmarks/overhead.py            a Markdown table
"""

import common
import pytest
import torch
from torch.nn import functional as F

from convext import functional

WHAT = ("without gradients", "forward", "forward and backward")


def calls(what: str):
    """Our call and PyTorch's."""
    input = torch.randn(1, 1, 4, 4, requires_grad=True)
    weight = torch.randn(1, 1, 3, 3, requires_grad=True)
    bias = torch.randn(1, requires_grad=True)
    grad = torch.ones(1, 1, 2, 2)

    def call(conv2d):
        def forward():
            return conv2d(input, weight, bias)

        def without_gradients():
            with torch.no_grad():
                conv2d(input, weight, bias)

        def backward():
            forward().backward(grad)

        return {"without gradients": without_gradients, "forward": forward}.get(what, backward)

    return call(functional.conv2d), call(F.conv2d)


def cases() -> list[common.Case]:
    return [common.Case(what, "ours", lambda what=what: calls(what)) for what in WHAT]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_overhead(benchmark, request, case):
    common.run(benchmark, request, case)


if __name__ == "__main__":
    common.markdown(cases(), "One convolution of a 1x1x4x4 input")
