"""Derivatives of the convolution ops of every order, and what PyTorch asks of an op."""

import pytest
import torch
from problems import LESSON_LAYERS, SMALL, named
from reference import PASSES, convext_pass, operands
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from convext.functional import conv2d
from convext.mnist.model import lesson_cnn

ops = torch.ops.convext

GRADCHECKED = [problem for problem in SMALL if problem.multiplications <= 1500]
# Numerical second derivatives take a call per pair of numbers.
TWICE = [
    named(name)
    for name in (
        "one multiplication",
        "all settings differ",
        "kernel as large as the padded input",
        "groups",
        "depthwise multiplier",
        "stride above the input",
        "batch of none",
    )
]


def leaves(problem, device, *names):
    """Copies of a problem's tensors, in float64, that require gradients."""
    data = operands(problem)
    return [getattr(data, name).to(device).clone().requires_grad_() for name in names]


def verbs(problem, device, algorithm):
    """Each op as a function of its tensors, with these tensors."""
    tail = (*problem.settings, algorithm)
    yield (
        lambda x, w, b: ops.conv2d(x, w, b, *tail),
        leaves(problem, device, "input", "weight", "bias"),
    )
    yield lambda x, w: ops.conv2d(x, w, None, *tail), leaves(problem, device, "input", "weight")
    yield (
        lambda g, w: ops.conv2d_backward_input(g, w, problem.input_size, *tail),
        leaves(problem, device, "grad_output", "weight"),
    )
    yield (
        lambda g, x: ops.conv2d_backward_weight(g, x, problem.weight_size, *tail),
        leaves(problem, device, "grad_output", "input"),
    )


# --------------------------------------------------------------------------------------------------
# Numerical derivatives


@pytest.mark.parametrize("problem", GRADCHECKED, ids=str)
def test_gradcheck(problem, device, algorithm):
    for verb, inputs in verbs(problem, device, algorithm):
        assert gradcheck(verb, inputs, fast_mode=problem.multiplications > 300)


@pytest.mark.parametrize("problem", TWICE, ids=str)
def test_gradgradcheck(problem, device, algorithm):
    for verb, inputs in verbs(problem, device, algorithm):
        assert gradgradcheck(verb, inputs, fast_mode=problem.multiplications > 300)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("padding", [(1, 0), "same"])
def test_functional_gradcheck(padding, with_bias, device, algorithm):
    problem = named("dilation and padding")
    inputs = leaves(problem, device, "input", "weight", "bias")[: 3 if with_bias else 2]

    def call(input, weight, bias=None):
        return conv2d(input, weight, bias, padding=padding, dilation=(2, 1), algorithm=algorithm)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_unbatched_gradcheck(device, algorithm):
    input = torch.randn(2, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(3, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x, w: conv2d(x, w, algorithm=algorithm), [input, weight])


def test_backward_bias_gradcheck(device):
    for problem in (named("plain"), named("batch of none")):
        inputs = leaves(problem, device, "grad_output")
        assert gradcheck(ops.conv2d_backward_bias, inputs)
        assert gradgradcheck(ops.conv2d_backward_bias, inputs)


# --------------------------------------------------------------------------------------------------
# Against PyTorch's


def derivatives(function, inputs, order):
    """Gradients of a scalar made of the first gradients, and so on; nonlinear, so none is zero."""
    result, found = function(*inputs), []
    for _ in range(order):
        grads = torch.autograd.grad(result.pow(3).sum(), inputs, create_graph=True)
        found += grads
        result = torch.cat([grad.flatten() for grad in grads])
    return found


@pytest.mark.parametrize("problem", [*SMALL, *LESSON_LAYERS], ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_equal_torchs(problem, order, device, algorithm):
    if problem.C == 0:  # PyTorch gives no output channels there
        return
    inputs = leaves(problem, device, "input", "weight", "bias")
    tail = problem.settings
    ours = derivatives(lambda *x: conv2d(*x, *tail, algorithm=algorithm), inputs, order)
    stock = derivatives(lambda *x: torch.nn.functional.conv2d(*x, *tail), inputs, order)
    for one, other in zip(ours, stock, strict=True):
        scale = (other.abs().max().item() if other.numel() else 0) or 1
        torch.testing.assert_close(one / scale, other / scale, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("problem", [named("groups"), named("depthwise multiplier")], ids=str)
def test_third_derivatives_equal_torchs(problem, device, algorithm):
    inputs = leaves(problem, device, "input", "weight", "bias")
    tail = problem.settings
    ours = derivatives(lambda *x: conv2d(*x, *tail, algorithm=algorithm), inputs, 3)
    stock = derivatives(lambda *x: torch.nn.functional.conv2d(*x, *tail), inputs, 3)
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max())


def test_gradients_in_channels_last(device, algorithm):
    problem = named("all settings differ")
    inputs = leaves(problem, device, "input", "weight", "bias")
    x, w, b = (
        t.detach().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.detach()
        for t in inputs
    )
    last = [t.requires_grad_() for t in (x, w, b)]
    for tensors in (inputs, last):
        conv2d(*tensors, *problem.settings, algorithm=algorithm).square().sum().backward()
    for one, other in zip(last, inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert one.grad.stride() == one.stride()


# --------------------------------------------------------------------------------------------------
# Only what is needed


def calls(function):
    """Names of all the ops that a function calls, each with its count."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    return {event.key: event.count for event in profiled.key_averages()}


@pytest.mark.parametrize("input_needs", [True, False])
@pytest.mark.parametrize("weight_needs", [True, False])
@pytest.mark.parametrize("bias_needs", [True, False, None])
def test_computes_only_the_gradients_that_are_needed(input_needs, weight_needs, bias_needs):
    data = operands(named("plain"))
    tensors = [data.input.clone(), data.weight.clone(), data.bias.clone()]
    needs = [input_needs, weight_needs, bool(bias_needs)]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    input, weight, bias = tensors
    output = conv2d(input, weight, None if bias_needs is None else bias)
    assert output.requires_grad == any(needs)
    if not any(needs):
        return
    seen = calls(lambda: output.sum().backward())
    names = ("conv2d_backward_input", "conv2d_backward_weight", "conv2d_backward_bias")
    for name, tensor, need in zip(names, tensors, needs, strict=True):
        assert seen.get(f"convext::{name}", 0) == int(need), name
        assert (tensor.grad is not None) == need


def test_no_graph_without_grad():
    input, weight = leaves(named("plain"), "cpu", "input", "weight")
    with torch.no_grad():
        assert conv2d(input, weight).grad_fn is None
    with torch.inference_mode():
        assert conv2d(input, weight).is_inference()


def test_a_changed_operand_is_noticed():
    input, weight = leaves(named("plain"), "cpu", "input", "weight")
    output = conv2d(input, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_saved_tensor_hooks_see_the_operands():
    input, weight = leaves(named("plain"), "cpu", "input", "weight")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        output = conv2d(input, weight)
    assert {t.data_ptr() for t in packed} == {input.data_ptr(), weight.data_ptr()}
    output.sum().backward()


# --------------------------------------------------------------------------------------------------
# What PyTorch asks of an op


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("input_layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("other_layout", ["contiguous_format", "channels_last"])
def test_fake_kernels_return_what_kernels_return(conv_pass, input_layout, other_layout):
    for problem in [*SMALL, *LESSON_LAYERS]:
        data = operands(problem, torch.bfloat16)
        first, other = getattr(torch, input_layout), getattr(torch, other_layout)
        data = data._replace(
            input=data.input.contiguous(memory_format=first),
            weight=data.weight.contiguous(memory_format=other),
            grad_output=data.grad_output.contiguous(memory_format=first),
        )
        real = convext_pass(problem, conv_pass, data)
        meta = convext_pass(problem, conv_pass, type(data)(*(t.to("meta") for t in data)))
        assert meta.shape == real.shape
        assert meta.dtype == real.dtype
        assert meta.stride() == real.stride()


# --------------------------------------------------------------------------------------------------
# Nothing but our own kernels

FOREIGN = (
    "convolution", "aten::conv", "aten::_conv", "mkldnn", "onednn", "cudnn", "miopen", "nnpack",
    "xnnpack", "aten::mm", "aten::matmul", "aten::bmm", "aten::addmm", "aten::baddbmm",
    "aten::linear", "aten::einsum", "im2col", "col2im", "unfold", "slow_conv", "thnn_conv",
    "batch_norm",
)  # fmt: skip


def foreign_ops(names):
    """Those of the profiler's names that are another library's convolution or batch norm."""
    others = (name for name in names if not name.startswith("convext::"))
    return [name for name in others if any(foreign in name for foreign in FOREIGN)]


def test_the_list_of_foreign_ops_knows_torchs():
    x, w, b = leaves(named("plain"), "cpu", "input", "weight", "bias")
    layer = torch.nn.BatchNorm2d(4).double()
    seen = calls(lambda: layer(torch.nn.functional.conv2d(x, w, b)).square().sum().backward())
    found = foreign_ops(seen)
    for name in ("aten::conv2d", "aten::convolution_backward", "aten::native_batch_norm"):
        assert name in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem", [LESSON_LAYERS[1], named("groups"), named("depthwise")], ids=str
)
def test_no_foreign_convolution(problem, dtype, device, algorithm):
    tensors = leaves(problem, device, "input", "weight", "bias")
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]

    def step():
        output = conv2d(*tensors, *problem.settings, algorithm=algorithm)
        output.square().sum().backward()

    seen = calls(step)
    assert not foreign_ops(seen)
    for name in ("", "_backward_input", "_backward_weight", "_backward_bias"):
        assert seen[f"convext::conv2d{name}"] == 1, sorted(seen)


def test_no_foreign_kernel_in_the_lesson_network(device, algorithm):
    net = lesson_cnn("convext", algorithm).to(device)
    images = torch.randn(4, 1, 28, 28, device=device)
    labels = torch.arange(4, device=device)

    def step():
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        net.eval()(images)

    seen = calls(step)
    assert not foreign_ops(seen)
    for name, count in {
        "conv2d": 10,
        "conv2d_backward_input": 4,  # the images need no gradient
        "conv2d_backward_weight": 5,
        "conv2d_backward_bias": 5,
        "batch_norm_train": 4,
        "batch_norm_eval": 4,
        "batch_norm_backward": 4,
    }.items():
        assert seen[f"convext::{name}"] == count, name
