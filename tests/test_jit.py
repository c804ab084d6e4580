"""torch.jit.trace of the layers and the lesson's network: eager's results, at other sizes too."""

import copy
import io

import pytest
import torch

import convext
from convext.mnist.model import lesson_cnn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # Whether the batch is empty, and whether "same" pads evenly, is settled in tracing.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LAYERS = {
    "Conv2d": lambda: convext.Conv2d(3, 4, (3, 2), (2, 1), (1, 2)),
    "Conv2d same": lambda: convext.Conv2d(3, 6, (3, 2), padding="same", dilation=(1, 3), groups=3),
    "Conv2d circular": lambda: convext.Conv2d(
        3, 4, (3, 2), padding=(1, 2), padding_mode="circular", bias=False, algorithm="im2col"
    ),
    "BatchNorm2d": lambda: convext.BatchNorm2d(3),
    "BatchNorm2d plain": lambda: convext.BatchNorm2d(3, affine=False, track_running_stats=False),
    "lesson": lesson_cnn,
}


def inputs(name, batch):
    """Of another batch, and for a layer of another picture; the network wants 28x28."""
    size = (1, 28, 28) if name == "lesson" else (3, 5 + batch, 9 + batch)
    return torch.randn(batch, *size, requires_grad=True)


def step(module, x):
    """Output, gradients of input and parameters, and the buffers that are left."""
    output = module(x)
    gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    return [output, *gradients, *module.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_traced_equals_eager(name, training):
    eager = LAYERS[name]().train(training)
    for module in eager.modules():
        if getattr(module, "running_mean", None) is not None:
            torch.nn.init.normal_(module.running_mean)
    twin = copy.deepcopy(eager)
    # The tracer's own check would step the running statistics.
    traced = torch.jit.trace(twin, inputs(name, 2), check_trace=False)
    twin.load_state_dict(eager.state_dict())  # tracing is a training step
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert any(f"convext::{op}" in str(loaded.inlined_graph) for op in ("conv2d", "batch_norm"))
    for batch in (2, 3, 7):
        x = inputs(name, batch)
        expected = step(eager, x)
        for module in (traced, loaded):
            torch.testing.assert_close(step(module, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d"])
def test_script_is_refused(name):
    """TorchScript, deprecated, cannot read the functional layer; trace, compile or export can."""
    with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(LAYERS[name]())
