"""torch.autocast: the same dtypes as with stock layers, everywhere."""

import pytest
import torch
from torch.nn import functional as F

from convext import functional
from convext.mnist.model import lesson_cnn

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_conv2d_runs_in_the_lower_precision(dtype, with_bias, device):
    def operands():
        torch.manual_seed(0)
        sizes = [(2, 3, 7, 6), (4, 3, 3, 2)] + ([(4,)] if with_bias else [])
        return [torch.randn(size, device=device).requires_grad_() for size in sizes]

    results = []
    for conv2d in (functional.conv2d, F.conv2d):
        given = operands()
        with torch.autocast(device, dtype=dtype):
            output = conv2d(*given, stride=(2, 1))
        output.float().square().sum().backward()
        results.append([output, *(t.grad for t in given)])
    for ours, stock in zip(*results, strict=True):
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock, rtol=0.05, atol=0.1)
    assert results[0][0].dtype == dtype


def test_float64_and_disabled_regions_stay_as_they_are(device):
    x, w = torch.randn(1, 2, 4, 5, device=device), torch.randn(3, 2, 2, 2, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert functional.conv2d(x.double(), w.double()).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert functional.conv2d(x, w).dtype == torch.float32
    assert functional.conv2d(x, w).dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_training_step_has_the_dtypes_of_stock_layers(dtype, device):
    seen = []
    for layers in ("convext", "torch"):
        torch.manual_seed(0)
        model = lesson_cnn(layers).to(device)
        dtypes = []
        for module in model:
            module.register_forward_hook(lambda m, _, out, d=dtypes: d.append(out.dtype))
        with torch.autocast(device, dtype=dtype):
            scores = model(torch.randn(8, 1, 28, 28, device=device))
            loss = F.cross_entropy(scores, torch.arange(8, device=device))
        loss.backward()
        gradients = [p.grad.dtype for p in model.parameters()]
        assert all(p.grad.isfinite().all() for p in model.parameters())
        seen.append((dtypes, gradients, [b.dtype for b in model.buffers()], loss.dtype))
    assert seen[0] == seen[1]
