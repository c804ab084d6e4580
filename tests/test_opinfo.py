"""PyTorch's own samples as an oracle: what OpInfo and ModuleInfo hold for our two operations.

Every sample runs in every dtype that our kernels have, and in three layouts. Values are compared
with PyTorch's float64 results on the same operands, at assert_close's tolerances for the dtype;
shapes, dtypes and the output's memory format with those of PyTorch in the sample's own dtype.

No sample is left out. int64 and complex, which OpInfo lists for conv2d, are no dtypes of ours and
refused by name (test_conv2d_errors.py). How many ran and passed stands in pytest's summary.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import convext
from convext import functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

OPS = {
    "nn.functional.conv2d": (functional.conv2d, F.conv2d),
    "nn.functional.batch_norm": (functional.batch_norm, F.batch_norm),
}
MODULES = {
    "nn.Conv2d": convext.Conv2d,
    "nn.LazyConv2d": convext.LazyConv2d,
    "nn.BatchNorm2d": convext.BatchNorm2d,
}
LAYOUTS = ["contiguous", "channels_last", "noncontiguous"]

# Where our message is another than PyTorch's: its words, and ours.
OWN_WORDS = {
    "should be the same": "must have dtype float32, float64, bfloat16 or float16",
    "dilation should be greater than zero": "dilation must be positive",
    "Expected 3-dimensional input for 3-dimensional weight": "Expected 4D weight",
    "expected weight to be at least 3 at dimension 0": "output channels divisible by it",
}


@pytest.fixture(scope="module")
def infos():
    """OpInfos and ModuleInfos by name, imported late: that takes seconds."""
    # The import would freeze torch.backends' flags for all tests.
    with mock.patch.object(torch.backends, "disable_global_flags", return_value=None):
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
        from torch.testing._internal.common_utils import noncontiguous_like
    return SimpleNamespace(
        ops={op.name: op for op in op_db if op.name in OPS and not op.variant_test_name},
        modules={module.name: module for module in module_db if module.name in MODULES},
        noncontiguous_like=noncontiguous_like,
    )


@pytest.fixture
def arrange(infos):
    """A function that gives a fresh copy of a tensor in a layout and, where asked, a dtype."""

    def arranged(value, layout, dtype=None):
        if not isinstance(value, torch.Tensor):
            return value
        copied = value.detach().to(dtype or value.dtype, copy=True)
        if layout == "channels_last" and value.dim() == 4:
            copied = copied.contiguous(memory_format=torch.channels_last)
        elif layout == "noncontiguous":
            copied = infos.noncontiguous_like(copied).detach()
        return copied.requires_grad_(value.requires_grad)

    return arranged


def cotangent(output):
    """Like output; values that every dtype holds exactly."""
    numbers = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (numbers / 4).to(output.dtype).reshape(output.shape)


def compare(ours, stock, exact):
    """Named results of ours, PyTorch's in the same dtype, and PyTorch's in float64."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name, mine in ours.items():
        other = stock[name]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name
        if name == "output" and mine.dim() == 4 and mine.numel() > 0:
            # Gradients come in the layout of what they are computed from, PyTorch's in others.
            for layout in (torch.contiguous_format, torch.channels_last):
                dense = [t.is_contiguous(memory_format=layout) for t in (mine, other)]
                assert dense[0] == dense[1], f"{layout}: ours {dense[0]}, PyTorch's {dense[1]}"
        torch.testing.assert_close(
            mine, exact[name].to(mine.dtype), msg=lambda message, name=name: f"{name}: {message}"
        )


class Report:
    """Runs samples, goes on after a failure, and says at the end how many passed."""

    def __init__(self, record_property):
        self.record, self.run, self.failures = record_property, 0, []

    def check(self, sample, function):
        self.run += 1
        try:
            function()
        except (Exception, pytest.fail.Exception) as error:
            self.failures.append(f"sample {sample}: {type(error).__name__}: {error}")

    def close(self, label):
        """The sums for each label stand in pytest's summary (conftest.py)."""
        self.record("samples", (label, self.run - len(self.failures), self.run))
        assert self.run > 0
        assert not self.failures, "\n\n".join(self.failures)


@pytest.fixture
def report(record_property):
    return Report(record_property)


# --------------------------------------------------------------------------------------------------
# Functions


def evaluate(function, sample, second_order):
    """Output, gradients, running statistics and, where asked, derivatives of the gradients."""
    operands = [sample.input, *sample.args, *sample.kwargs.values()]
    tensors = [t for t in operands if isinstance(t, torch.Tensor)]
    wanted = [t for t in tensors if t.requires_grad]
    output = function(sample.input, *sample.args, **sample.kwargs)
    gradients = torch.autograd.grad(output, wanted, cotangent(output), create_graph=second_order)
    results = {"output": output}
    results |= {f"gradient {i}": t for i, t in enumerate(gradients)}
    results |= {f"statistic {i}": t for i, t in enumerate(tensors) if not t.requires_grad}
    if second_order and any(t.requires_grad for t in gradients):
        loss = sum(t.sin().sum() for t in gradients)
        second = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results |= {f"second derivative {i}": t for i, t in enumerate(second)}
    return results


def all_samples(op, device, dtype, layout):
    """Reference inputs too, where an OpInfo has them; in torch 2.13 neither does."""
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    if op.reference_inputs_func is not None:
        samples += op.reference_inputs(device, dtype, requires_grad=True)
    for sample in samples:
        operands = (sample.input, *sample.args)
        if layout != "channels_last" or any(getattr(t, "ndim", 0) == 4 for t in operands):
            yield sample


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_op_samples(name, dtype, layout, device, infos, arrange, report):
    ours, stock = OPS[name]
    second_order = dtype == torch.float64
    for number, sample in enumerate(all_samples(infos.ops[name], device, dtype, layout)):

        def check(sample=sample):
            same, other, double = (
                sample.transform(lambda t, d=d: arrange(t, layout, d))
                for d in (None, None, torch.float64)
            )
            compare(
                evaluate(ours, same, second_order),
                evaluate(stock, other, second_order),
                evaluate(stock, double, second_order),
            )

        report.check(number, check)
    report.close(f"{name} {dtype}")


def test_op_error_inputs(device, infos, report):
    """Batch norm's OpInfo has none."""
    name = "nn.functional.conv2d"
    ours, stock = OPS[name]
    for number, error in enumerate(infos.ops[name].error_inputs(device)):

        def check(error=error):
            sample = error.sample_input
            for function, words in (
                (stock, error.error_regex),
                (ours, OWN_WORDS.get(error.error_regex, error.error_regex)),
            ):
                with pytest.raises(error.error_type, match=words):
                    function(sample.input, *sample.args, **sample.kwargs)

        report.check(number, check)
    report.close(f"{name} errors")


# --------------------------------------------------------------------------------------------------
# Layers


def evaluate_module(module, args, kwargs):
    """Output, gradients of inputs and parameters, and buffers."""
    output = module(*args, **kwargs)
    output.backward(cotangent(output))
    results = {"output": output}
    results |= {f"gradient {i}": t.grad for i, t in enumerate(args)}
    results |= {f"gradient of {k}": p.grad for k, p in module.named_parameters()}
    return results | dict(module.named_buffers())


def build(module_class, sample, dtype, device, layout):
    torch.manual_seed(0)
    given = sample.constructor_input
    module = module_class(*given.args, **given.kwargs, dtype=dtype, device=device)
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        module.initialize_parameters(*sample.forward_input.args)
    if layout == "channels_last":
        module.to(memory_format=torch.channels_last)
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, dtype, training, layout, device, infos, arrange, report):
    info = infos.modules[name]
    samples = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    for number, sample in enumerate(samples):

        def check(sample=sample):
            ours, stock = (
                build(module_class, sample, dtype, device, layout).train(training)
                for module_class in (MODULES[name], info.module_cls)
            )
            exact = copy.deepcopy(stock).double()
            given = sample.forward_input
            results = []
            for module, cast in ((ours, None), (stock, None), (exact, torch.float64)):
                args = [arrange(t, layout, cast) for t in given.args]
                kwargs = {k: arrange(t, layout, cast) for k, t in given.kwargs.items()}
                results.append(evaluate_module(module, args, kwargs))
            compare(*results)
            if sample.reference_fn is not None:
                # What PyTorch says that this layer should do, computed by itself.
                expected = sample.reference_fn(ours, *given.args, **given.kwargs)
                torch.testing.assert_close(results[0]["output"], expected)

        report.check(number, check)
    report.close(f"{name} {dtype}")


def test_module_error_inputs(device, infos, report):
    """BatchNorm2d's; Conv2d's ModuleInfo has none."""
    info = infos.modules["nn.BatchNorm2d"]
    errors = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=True, training=True
    )
    for number, error in enumerate(errors):

        def check(error=error):
            sample = error.module_error_input
            given = sample.forward_input
            for module_class in (info.module_cls, MODULES["nn.BatchNorm2d"]):
                with pytest.raises(error.error_type, match=error.error_regex):
                    build(module_class, sample, torch.float32, device, "contiguous")(
                        *given.args, **given.kwargs
                    )

        report.check(number, check)
    report.close("nn.BatchNorm2d errors")
