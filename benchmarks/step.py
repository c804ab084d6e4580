"""A whole training step of the lesson's network, our layers beside stock ones.

python benchmarks/step.py                a Markdown table
"""

import common
import pytest
import torch

import convext
from convext.mnist.model import lesson_cnn

BATCHES = (64, 512)


def step(layers: str, algorithm: str, batch: int, optimise: bool):
    """A function that does one step: zero_grad, forward, loss, backward, and AdamW."""
    torch.manual_seed(0)
    model = lesson_cnn(layers, algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))

    def call():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        if optimise:
            optimizer.step()

    return call


def cases() -> list[common.Case]:
    return [
        common.Case(
            f"batch {batch}, {what}",
            algorithm,
            lambda batch=batch, name=algorithm, optimise=optimise: (
                step("convext", name, batch, optimise),
                step("torch", "auto", batch, optimise),
            ),
        )
        for batch in BATCHES
        for what, optimise in (("forward and backward", False), ("with AdamW", True))
        for algorithm in ("auto", *convext.algorithms())
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_step(benchmark, request, case):
    common.run(benchmark, request, case)


if __name__ == "__main__":
    common.markdown(cases(), "A training step of the lesson's network, float32")
