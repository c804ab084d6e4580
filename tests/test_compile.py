"""torch.compile and torch.export of the lesson's network: whole graphs, and eager's results."""

import copy

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import nn

import convext
from convext.mnist.model import lesson_cnn


def step(model, call, x):
    """Scores of one call, then the gradients of all parameters and the running statistics."""
    model.zero_grad()
    scores = call(x)
    scores.square().sum().backward()
    return [scores, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize(
    ("backend", "memory_format", "dynamic"),
    [
        ("aot_eager", torch.contiguous_format, True),
        ("aot_eager", torch.channels_last, False),
        pytest.param("inductor", torch.contiguous_format, False, marks=pytest.mark.slow),
        pytest.param("inductor", torch.channels_last, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_without_a_graph_break(backend, memory_format, dynamic):
    torch._dynamo.reset()
    eager = lesson_cnn().to(memory_format=memory_format)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (4, 7) if dynamic else (4, 4):
        x = torch.randn(batch, 1, 28, 28)
        for mine, other in zip(step(eager, eager, x), step(twin, compiled, x), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_exports_with_a_dynamic_batch():
    model = lesson_cnn().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (torch.randn(3, 1, 28, 28),), dynamic_shapes={"input": {0: batch}}
    )
    assert any("convext.conv2d" in str(node.target) for node in program.graph.nodes)
    for size in (2, 9):
        x = torch.randn(size, 1, 28, 28)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_autograd(training):
    """The nodes that an eager forward pass left, in a compiled backward pass."""
    torch._dynamo.reset()
    eager = nn.Sequential(
        convext.Conv2d(3, 4, (3, 2), padding=(1, 0)),
        convext.BatchNorm2d(4),
        convext.ConvBlock2d(4, 6, (2, 3), stride=(2, 1)),
    ).train(training)
    twin = copy.deepcopy(eager)
    x = torch.randn(4, 3, 7, 8)
    expected = step(eager, eager, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        compiled = step(twin, twin, x)
    for mine, other in zip(compiled, expected, strict=True):
        torch.testing.assert_close(mine, other)
