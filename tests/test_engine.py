"""What PyTorch's autograd engine offers, on our layers as on PyTorch's own.

Gradient modes, activation checkpointing, hooks on saved tensors and on gradients, tensors modified
between forward and backward, and anomaly detection.
"""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.nn import functional as F
from torch.utils import checkpoint

import convext
from convext import functional

KINDS = {"convext": convext, "torch": nn}
CONV2D = {"convext": functional.conv2d, "torch": F.conv2d}
BATCH_NORM = {"convext": functional.batch_norm, "torch": F.batch_norm}


def network(kind, device, **factory):
    """Grouped, strided, with and without bias and affine; the same values for both kinds."""
    torch.manual_seed(0)
    layers = KINDS[kind]
    return nn.Sequential(
        layers.Conv2d(3, 4, (3, 2), padding=(1, 0), **factory),
        layers.BatchNorm2d(4, **factory),
        nn.ReLU(),
        layers.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2, bias=False, **factory),
        layers.BatchNorm2d(6, affine=False, **factory),
    ).to(device)


def images(device, dtype=torch.float32):
    return torch.randn(4, 3, 7, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def state(model, output, *inputs):
    """The output, all gradients, and the buffers."""
    gradients = [t.grad for t in (*inputs, *model.parameters())]
    return [output, *gradients, *model.buffers()]


def check_equal(ours, stock, **tolerances):
    for mine, other in zip(ours, stock, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, **tolerances)


def both(run):
    return [run(kind) for kind in KINDS]


# --------------------------------------------------------------------------------------------------
# Gradient modes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradient_modes(mode, training, device):
    def run(kind):
        model = network(kind, device).train(training)
        with mode():
            output = model(images(device))
        flags = output.requires_grad, output.grad_fn is None, output.is_inference()
        buffers = [(b.is_inference(), b.requires_grad) for b in model.buffers()]
        return flags, buffers, [output.clone(), *model.buffers()]

    ours, stock = both(run)
    assert ours[:2] == stock[:2]
    check_equal(ours[2], stock[2])


def test_training_goes_on_after_inference_mode(device):
    """Running statistics that were updated there are no inference tensors."""

    def run(kind):
        model, x = network(kind, device), images(device)
        with torch.inference_mode():
            model(x)
        output = model(x)
        output.square().sum().backward()
        return state(model, output)

    check_equal(*both(run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_are_refused_where_they_would_be_saved(kind, device):
    model = network(kind, device)
    with torch.inference_mode():
        x = images(device)
        frozen = network(kind, device).eval()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model[0](x)
    model[0](x.clone()).sum().backward()
    with torch.no_grad():
        assert not model[0](x).requires_grad
        assert not frozen(images(device)).requires_grad


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_only_what_is_asked_for_has_a_gradient(wanted, device):
    """requires_grad of input, weight and bias; and the same asked of autograd.grad."""

    def run(kind, require):
        torch.manual_seed(0)
        operands = [torch.randn(size, device=device) for size in [(2, 4, 5, 6), (6, 2, 3, 2), (6,)]]
        for i in require:
            operands[i].requires_grad_()
        output = CONV2D[kind](*operands, stride=(1, 2), groups=2)
        return torch.autograd.grad(output.square().sum(), [operands[i] for i in wanted])

    for require in (wanted, (0, 1, 2)):
        check_equal(*both(lambda kind, r=require: run(kind, r)), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Activation checkpointing


@pytest.mark.parametrize("variant", ["reentrant", "non-reentrant", "stops early"])
def test_checkpointing(variant, device):
    """The very bits of a run without; and PyTorch's running statistics, updated twice.

    PyTorch may stop a recomputation at the last tensor that was saved. Whether the statistics of
    the last batch norm are updated again is then a matter of order, and not compared.
    """

    def run(kind, checkpointed):
        model, x = network(kind, device), images(device).requires_grad_()
        if checkpointed:
            output = checkpoint.checkpoint(model, x, use_reentrant=variant == "reentrant")
        else:
            output = model(x)
        output.square().sum().backward()
        return state(model, output, x), list(model.buffers())

    with checkpoint.set_checkpoint_early_stop(variant == "stops early"):
        (ours, ours_buffers), (plain, _) = run("convext", True), run("convext", False)
        stock, stock_buffers = run("torch", True)
    results = len(ours) - len(ours_buffers)
    check_equal(ours[:results], plain[:results], rtol=0, atol=0)
    check_equal(ours[:results], stock[:results], rtol=1e-4, atol=1e-4)
    if variant == "stops early":
        ours_buffers, stock_buffers = ours_buffers[:3], stock_buffers[:3]
    check_equal(ours_buffers, stock_buffers)


def test_checkpoint_sequential(device):
    def run(kind):
        model, x = network(kind, device), images(device).requires_grad_()
        with checkpoint.set_checkpoint_early_stop(False):
            output = checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
            output.square().sum().backward()
        return state(model, output, x)

    check_equal(*both(run), rtol=1e-4, atol=1e-4)


def test_selective_checkpointing_keeps_the_convolutions(device):
    """A policy may name our ops: what it keeps is not computed a second time."""
    conv2d = torch.ops.convext.conv2d.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[op] = counts.get(op, 0) + 1
            return op(*args, **(kwargs or {}))

    gradients = []
    for kept, expected in (([conv2d], 2), ([], 4)):
        counts = {}
        model, x = network("convext", device), images(device).requires_grad_()
        with Count():
            checkpoint.checkpoint(
                model,
                x,
                use_reentrant=False,
                context_fn=lambda kept=kept: checkpoint.create_selective_checkpoint_contexts(kept),
            ).square().sum().backward()
        assert counts[conv2d] == expected
        gradients.append(x.grad)
    assert torch.equal(*gradients)


# --------------------------------------------------------------------------------------------------
# Saved tensors


def packed_sizes(call, *tensors):
    """Sizes of what a call saves for its backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.shape)
        return tensor

    with graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*tensors)
    return sizes


@pytest.mark.parametrize("with_gradient", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_convolution_saves_what_torch_saves(with_gradient, device):
    operands = [torch.randn(size, device=device) for size in [(2, 4, 5, 6), (6, 4, 3, 2), (6,)]]
    for i in with_gradient:
        operands[i].requires_grad_()
    ours, stock = both(lambda kind: packed_sizes(CONV2D[kind], *operands))
    assert ours == stock == [(2, 4, 5, 6), (6, 4, 3, 2)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_saves_no_more_than_torch(training, device):
    x, weight = torch.randn(2, 4, 5, 6, device=device), torch.ones(4, device=device)
    x.requires_grad_()
    weight.requires_grad_()

    def run(kind):
        running = torch.zeros(4, device=device), torch.ones(4, device=device)
        return packed_sizes(
            lambda *t: BATCH_NORM[kind](t[0], *running, t[1], training=training), x, weight
        )

    ours, stock = both(run)
    assert ours == [(2, 4, 5, 6), (4,), (4,), (4,)]
    assert sum(size.numel() for size in ours) <= sum(size.numel() for size in stock)


def test_hooks_may_replace_what_was_saved(device):
    """What unpack returns is what backward computes with."""
    x = torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    weight = torch.randn(6, 4, 3, 2, device=device, requires_grad=True)
    with graph.saved_tensors_hooks(lambda tensor: 3 * tensor.detach(), lambda tensor: tensor):
        output = functional.conv2d(x, weight)
    ours = torch.autograd.grad(output.sum(), (x, weight))
    plain = torch.autograd.grad(functional.conv2d(x, weight).sum(), (x, weight))
    check_equal(ours, [3 * t for t in plain])


def test_saving_on_the_cpu(device):
    def run(offload):
        model, x = network("convext", device), images(device).requires_grad_()
        with graph.save_on_cpu() if offload else contextlib.nullcontext():
            output = model(x)
        output.square().sum().backward()
        return state(model, output, x)

    check_equal(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_may_be_forbidden(kind, device):
    model, x = network(kind, device), images(device)
    with (
        graph.disable_saved_tensors_hooks("no hooks here"),
        pytest.raises(RuntimeError, match="no hooks here"),
        graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        model(x)


# --------------------------------------------------------------------------------------------------
# Tensors modified between forward and backward

MODIFIED = {
    # operands that need a gradient, the operand that is modified
    "conv2d input": ("conv2d", (0, 1, 2), 0),
    "conv2d input beside a frozen weight": ("conv2d", (0,), 0),
    "conv2d weight": ("conv2d", (0, 1, 2), 1),
    "conv2d weight beside a frozen input": ("conv2d", (1,), 1),
    "batch_norm input": ("batch_norm", (0, 1), 0),
    "batch_norm weight": ("batch_norm", (0, 1), 1),
    "batch_norm weight alone": ("batch_norm", (1,), 1),
    "batch_norm running mean in eval": ("batch_norm eval", (0, 1), 2),
    "batch_norm running var in eval": ("batch_norm eval", (0, 1), 3),
}


def recorded(kind, name, with_gradient, device):
    """Operands and output of a call."""
    if name == "conv2d":
        sizes = [(2, 4, 5, 6), (6, 4, 3, 2), (6,)]
    else:
        sizes = [(2, 4, 5, 6), (4,), (4,), (4,)]
    operands = [torch.rand(size, device=device) for size in sizes]
    for i in with_gradient:
        operands[i].requires_grad_()
    if name == "conv2d":
        return operands, CONV2D[kind](*operands)
    x, weight, mean, var = operands
    training = name == "batch_norm"
    return operands, BATCH_NORM[kind](x, mean, var, weight, training=training)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MODIFIED)
def test_modified_operands_are_noticed(case, kind, device):
    name, with_gradient, which = MODIFIED[case]
    operands, output = recorded(kind, name, with_gradient, device)
    with torch.no_grad():
        operands[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "batch_norm eval"])
def test_output_and_bias_may_be_modified(name, kind, device):
    operands, output = recorded(kind, name, (0, 1, 2) if name == "conv2d" else (0, 1), device)
    if name == "conv2d":
        with torch.no_grad():
            operands[2].zero_()
    output.mul_(2).sum().backward()
    assert operands[1].grad.isfinite().all()


def test_running_statistics_may_change_between_forward_and_backward(device):
    """In training the batch's own are saved. PyTorch saves the running ones too, and refuses."""
    gradients = []
    for change in (False, True):
        torch.manual_seed(0)
        operands, output = recorded("convext", "batch_norm", (0, 1), device)
        if change:
            operands[2].zero_()
            operands[3].fill_(1)
        gradients.append(torch.autograd.grad(output.square().sum(), operands[:2]))
    check_equal(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "batch_norm eval"])
def test_backward_twice_needs_the_graph_kept(name, kind, device):
    operands, output = recorded(kind, name, (0, 1), device)
    loss = output.square().sum()
    first = torch.autograd.grad(loss, operands[:2], retain_graph=True)
    check_equal(first, torch.autograd.grad(loss, operands[:2]), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, operands[:2])


# --------------------------------------------------------------------------------------------------
# Hooks on gradients, and anomaly detection


def test_hooks_on_gradients(device):
    def run(kind):
        model, x = network(kind, device), images(device).requires_grad_()
        seen = []
        for name, module in model.named_children():
            module.register_full_backward_hook(
                lambda _, into, out, n=name: seen.append((n, *(tuple(t.shape) for t in into + out)))
            )
            module.register_full_backward_pre_hook(lambda _, out, n=name: seen.append((n, "pre")))
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, n=name: seen.append((n, tuple(g.shape))))
            parameter.register_post_accumulate_grad_hook(
                lambda p, n=name: seen.append((n, "accumulated", tuple(p.grad.shape)))
            )
        model(x).square().sum().backward()
        return sorted(map(str, seen))

    ours, stock = both(run)
    assert ours == stock
    assert len(ours) == 2 * 5 + 2 * 5


def test_anomaly_detection(device):
    def run(kind):
        model, x = network(kind, device), images(device).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                output = model(x)
                output.square().sum().backward()
        return state(model, output, x)

    check_equal(*both(run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("conv2d", "convext::Conv2d"),
        ("batch_norm", "convext::BatchNormTrain"),
        ("batch_norm eval", "convext::BatchNormEval"),
    ],
)
def test_anomalies_are_named(name, node, device):
    """The error names our node, the warning the line that called it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly():
            _, output = recorded("convext", name, (0, 1), device)
            assert node in output.grad_fn.name()
            bad = torch.full_like(output, float("nan"))
            with pytest.raises(RuntimeError, match=node + ".*returned nan values"):
                output.backward(bad)
    traceback = next(str(w.message) for w in caught if "Error detected in" in str(w.message))
    assert node in traceback
    assert "in recorded" in traceback
