"""What FlopCounterMode counts and the profiler shows."""

import itertools

import pytest
import torch
from problems import SMALL
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import convext
from convext import functional

ops, aten = torch.ops.convext, torch.ops.aten


def operands(problem, wanted, device):
    sizes = problem.input_size, problem.weight_size, (problem.O,)
    tensors = [torch.randn(size, device=device) for size in sizes]
    for tensor, requires_grad in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(requires_grad)
    return tensors


def counts(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return dict(counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_convolutions_count_as_theirs(problem, device):
    """Groups are counted one by one, for PyTorch's formula for grad_weight takes no notice of them.

    Its other two do, and are compared as they are.
    """
    stride, padding, dilation, groups = problem.settings

    def group_by_group(x, w, b):
        parts = zip(*(t.chunk(groups, dim) for t, dim in ((x, 1), (w, 0), (b, 0))), strict=True)
        return torch.cat([F.conv2d(*part, stride, padding, dilation) for part in parts], 1)

    def backward(output):
        if output.requires_grad:
            output.square().sum().backward()

    for wanted in itertools.product((False, True), repeat=3):
        given = operands(problem, wanted, device)
        ours = counts(lambda g=given: backward(functional.conv2d(*g, *problem.settings)))
        one_by_one = counts(lambda g=given: backward(group_by_group(*g)))
        stock = counts(lambda g=given: backward(F.conv2d(*g, *problem.settings)))
        assert ours[ops.conv2d] == one_by_one[aten.convolution] == stock[aten.convolution]
        assert sum(ours.values()) == sum(one_by_one.values())
        if groups == 1 or not wanted[1]:
            assert sum(ours.values()) == sum(stock.values())


def test_count_without_bias_and_without_batch(device):
    x, w = torch.randn(4, 7, 6, device=device), torch.randn(6, 4, 3, 2, device=device)
    w.requires_grad_()
    ours, stock = (
        counts(lambda f=f: f(x, w, stride=(1, 2)).sum().backward())
        for f in (functional.conv2d, F.conv2d)
    )
    assert sum(ours.values()) == sum(stock.values()) == 2 * 2 * (6 * 5 * 3) * 4 * 3 * 2


def test_counts_of_layers(device):
    """Each module's share, forward and backward; batch norm counts nothing, as PyTorch's does."""

    def run(layers):
        model = nn.Sequential(
            layers.Conv2d(3, 4, (3, 2), padding=(1, 0)),
            layers.BatchNorm2d(4),
            nn.ReLU(),
            layers.Conv2d(4, 6, (2, 3), stride=(2, 1), bias=False),
        ).to(device)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 8, 7, device=device)).square().sum().backward()
        return {name: sum(share.values()) for name, share in counter.get_flop_counts().items()}

    ours, stock = run(convext), run(nn)
    assert ours == stock
    assert ours["Sequential.3"] > 0


def test_counts_on_meta_tensors():
    layer = convext.Conv2d(3, 4, (3, 2), device="meta")
    x = torch.randn(2, 3, 8, 7, device="meta")
    assert counts(lambda: layer(x).sum().backward()) == {
        ops.conv2d: 2 * 2 * (4 * 6 * 6) * 3 * 3 * 2,
        ops.conv2d_backward_weight: 2 * 2 * (4 * 6 * 6) * 3 * 3 * 2,
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_block_counts_as_its_convolution(training, device):
    def run(layers):
        torch.manual_seed(0)
        x = torch.randn(2, 4, 8, 7, device=device, requires_grad=True)
        w = torch.randn(6, 2, 3, 2, device=device, requires_grad=True)
        norm = torch.zeros(6, device=device), torch.ones(6, device=device)
        return counts(lambda: layers(x, w, norm).square().sum().backward())

    fused = run(
        lambda x, w, norm: functional.conv_block(x, w, None, *norm, groups=2, training=training)
    )
    plain = run(lambda x, w, norm: functional.conv2d(x, w, groups=2))
    assert sum(fused.values()) == sum(plain.values()) > 0


def test_profiler_shows_names_and_shapes(device):
    model = nn.Sequential(convext.Conv2d(3, 4, (3, 2)), convext.BatchNorm2d(4)).to(device)
    x = torch.randn(2, 3, 8, 7, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        model(x).square().sum().backward()
    shapes = {e.name: [s for s in e.input_shapes if s] for e in recorded.events()}
    out = [2, 4, 6, 6]
    assert {name: value for name, value in shapes.items() if name.startswith("convext::")} == {
        "convext::conv2d": [[2, 3, 8, 7], [4, 3, 3, 2], [4]],
        "convext::batch_norm_train": [out, [4], [4]],
        "convext::update_running_statistics": [[4], [4], [4], [4]],
        "convext::batch_norm_backward": [out, out, [4], [4], [4]],
        "convext::conv2d_backward_input": [out, [4, 3, 3, 2]],
        "convext::conv2d_backward_weight": [out, [2, 3, 8, 7]],
        "convext::conv2d_backward_bias": [out],
    }
    for node in ("Conv2d", "BatchNormTrain"):  # of the backward pass
        name = f"torch::autograd::CppNode<convext::{node}>"
        assert f"autograd::engine::evaluate_function: {name}" in shapes
