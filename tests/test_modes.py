"""Settings and modes of PyTorch that a layer must honour, and classes that stand for tensors.

Default dtype and device, deterministic algorithms, float32 precision, TorchDispatchMode and
TorchFunctionMode, tensor subclasses, meta and copy-on-write tensors.
"""

import contextlib
import warnings

import pytest
import torch
from problems import SMALL
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import functional


def network(layers, **factory):
    torch.manual_seed(0)
    return nn.Sequential(
        layers.Conv2d(3, 4, (3, 2), padding=(1, 0), **factory),
        layers.BatchNorm2d(4, **factory),
        nn.ReLU(),
        layers.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2, bias=False, **factory),
    )


def operands(problem, device):
    torch.manual_seed(0)
    sizes = problem.input_size, problem.weight_size, (problem.O,)
    return [torch.randn(size, device=device).requires_grad_() for size in sizes]


def convolution(problem, device, algorithm="auto"):
    """Output and gradients."""
    given = operands(problem, device)
    output = functional.conv2d(*given, *problem.settings, algorithm=algorithm)
    return [output, *torch.autograd.grad(output.square().sum(), given)]


def normalization(training, device):
    """Output, gradients and running statistics."""
    torch.manual_seed(0)
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    given = [torch.rand(s, device=device).requires_grad_() for s in [(3, 4, 5, 6), (4,), (4,)]]
    output = functional.batch_norm(given[0], *running, *given[1:], training=training)
    return [output, *torch.autograd.grad(output.square().sum(), given), *running]


# --------------------------------------------------------------------------------------------------
# Defaults


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        results = []
        for layers in (convext, nn):
            model = network(layers)
            output = model(torch.randn(2, 3, 8, 7))
            output.sum().backward()
            results.append([output, *model.state_dict().values(), model[3].weight.grad])
        for ours, stock in zip(*results, strict=True):
            assert ours.dtype == stock.dtype
            rounded = 0.05 if dtype == torch.bfloat16 else 1e-6  # after every layer
            torch.testing.assert_close(ours, stock, rtol=rounded, atol=rounded)
        assert results[0][0].dtype == dtype
        # What sums are accumulated in does not follow the default.
        x = torch.randn(2, 4, 5, 6, dtype=torch.float16)
        _, mean, var = torch.ops.convext.batch_norm_train(x, None, None, 1e-5)
        assert mean.dtype == var.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_default_device():
    with torch.device("meta"):
        model = network(convext)
        assert model(torch.randn(2, 3, 8, 7)).is_meta
    assert all(t.is_meta for t in model.state_dict().values())


# --------------------------------------------------------------------------------------------------
# Determinism and precision


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms, by which new memory is filled with NaN besides."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_deterministic_convolution(problem, device, algorithm, deterministic):
    ours = convolution(problem, device, algorithm)
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, ours, convolution(problem, device, algorithm)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_deterministic_batch_norm(training, device, deterministic):
    ours = normalization(training, device)
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, ours, normalization(training, device)))


@contextlib.contextmanager
def precision(holder, name, value):
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def matmul_precision(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


backends = torch.backends
FLAGS = {
    "conv tf32": lambda: precision(backends.mkldnn.conv, "fp32_precision", "tf32"),
    "conv bf16": lambda: precision(backends.mkldnn.conv, "fp32_precision", "bf16"),
    "conv ieee": lambda: precision(backends.mkldnn.conv, "fp32_precision", "ieee"),
    "all tf32": lambda: precision(backends, "fp32_precision", "tf32"),
    "mkldnn off": lambda: backends.mkldnn.flags(enabled=False, allow_tf32=None),
    "matmul medium": lambda: matmul_precision("medium"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_float32_is_exact_on_the_cpu_whatever_the_flags(flag):
    plain = [convolution(problem, "cpu") for problem in SMALL]
    with FLAGS[flag]():
        flagged = [convolution(problem, "cpu") for problem in SMALL]
    for ours, stock in zip(flagged, plain, strict=True):
        assert all(map(torch.equal, ours, stock))


# --------------------------------------------------------------------------------------------------
# Modes and subclasses


def test_dispatch_modes_see_every_op(device):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    def ops(requires_grad, training=True):
        seen.clear()
        model = network(convext).to(device).train(training).requires_grad_(requires_grad)
        with Record():
            output = model(torch.randn(2, 3, 8, 7, device=device))
            if requires_grad:
                output.sum().backward()
        return [name.removeprefix("convext.") for name in seen if name.startswith("convext.")]

    seen = []
    forward = ["conv2d.default", "batch_norm_train.default", "conv2d.default"]
    assert ops(requires_grad=False) == forward
    assert ops(requires_grad=False, training=False)[1] == "batch_norm_eval.default"
    backward = ops(requires_grad=True)[3:]
    # The first layer's input needs no gradient, the last layer has no bias.
    assert sorted(backward) == [
        "batch_norm_backward.default",
        "conv2d_backward_bias.default",
        "conv2d_backward_input.default",
        "conv2d_backward_weight.default",
        "conv2d_backward_weight.default",
    ]


def test_a_dispatch_mode_may_replace_results(device):
    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            return result.zero_() if op is torch.ops.convext.conv2d.default else result

    layer = convext.Conv2d(3, 4, (3, 2)).to(device)
    with Zeros():
        assert layer(torch.randn(2, 3, 8, 7, device=device)).eq(0).all()


def test_function_modes_see_the_ops(device):
    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    model = network(convext).to(device)
    x = torch.randn(2, 3, 8, 7, device=device)
    with Record():
        model(x)
    assert sum("conv2d" in name for name in seen) >= 2
    assert any("batch_norm" in name for name in seen)


class Named(torch.Tensor):
    """Sees functions called; its results are of its kind."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)


def test_torch_function_subclasses(device):
    results = []
    for layers in (convext, nn):
        Named.seen = []
        model = network(layers).to(device)
        x = torch.randn(2, 3, 8, 7, device=device).as_subclass(Named)
        output = model(x)
        output.sum().backward()
        assert type(output) is Named
        assert sum("conv2d" in name for name in Named.seen) >= 2
        assert any("batch_norm" in name for name in Named.seen)
        results.append([output.as_subclass(torch.Tensor), *(p.grad for p in model.parameters())])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


class Wrapper(torch.Tensor):
    """Holds a tensor, and runs ops on it: what quantised or distributed tensors are made like."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        def unwrap(t):
            return t.inner if isinstance(t, Wrapper) else t

        def wrap(t):
            return Wrapper(t) if isinstance(t, torch.Tensor) else t

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(wrap, op(*args, **kwargs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torch_dispatch_subclasses(training, device):
    model = network(convext).to(device).train(training)
    plain = torch.randn(2, 3, 8, 7, device=device, requires_grad=True)
    wrapped = Wrapper(plain.detach().clone()).requires_grad_()
    output = model(wrapped)
    output.square().sum().backward()
    assert type(output) is type(wrapped.grad) is Wrapper
    model(plain).square().sum().backward()
    assert torch.equal(wrapped.grad.inner, plain.grad)


# --------------------------------------------------------------------------------------------------
# Tensors without memory of their own


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_meta_layers(memory_format):
    """Shapes, dtypes and memory formats of a real run; then memory, and the real thing."""
    model = network(convext, device="meta").to(memory_format=memory_format)
    real = network(convext).to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 7).to(memory_format=memory_format)
    results = []
    for run, given in ((model, x.to("meta")), (real, x)):
        output = run(given)
        output.sum().backward()
        tensors = [output, *(p.grad for p in run.parameters()), *run.buffers()]
        results.append([(t.shape, t.dtype, t.stride()) for t in tensors])
        assert all(t.device == given.device for t in tensors)
    assert results[0] == results[1]

    made = network(convext, device="meta").to(memory_format=memory_format).to_empty(device="cpu")
    made.load_state_dict(real.state_dict())
    assert torch.equal(made.eval()(x), real.eval()(x))
    assigned = network(convext, device="meta")
    assigned.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(assigned.eval()(x), real(x))


INPUT, WEIGHT = (2, 4, 5, 6), (6, 4, 3, 2)
REFUSED = {
    "channels": (INPUT, (6, 3, 3, 2), {}),
    "channels of a group": (INPUT, WEIGHT, {"groups": 2}),
    "output channels": (INPUT, (5, 2, 3, 2), {"groups": 2}),
    "kernel above input": (INPUT, (6, 4, 6, 2), {}),
    "dilated kernel above input": (INPUT, WEIGHT, {"dilation": (1, 6)}),
    "stride": (INPUT, WEIGHT, {"stride": (0, 1)}),
    "padding": (INPUT, WEIGHT, {"padding": (0, -1)}),
    "dilation": (INPUT, WEIGHT, {"dilation": 0}),
    "groups": (INPUT, WEIGHT, {"groups": 0}),
    "three strides": (INPUT, WEIGHT, {"stride": (1, 1, 1)}),
    "weight's axes": (INPUT, (6, 4, 3), {}),
    "bias": (INPUT, WEIGHT, {"bias": torch.ones(5)}),
    "bias's axes": (INPUT, WEIGHT, {"bias": torch.ones(6, 1)}),
    "dtype": (INPUT, WEIGHT, {"bias": torch.ones(6, dtype=torch.float64)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_meta_tensors_are_refused_like_real_ones(case):
    input_size, weight_size, settings = REFUSED[case]
    for device in ("cpu", "meta"):
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        x, w = torch.ones(input_size, device=device), torch.ones(weight_size, device=device)
        with pytest.raises(RuntimeError):
            functional.conv2d(x, w, **given)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_meta_batch_norm_refuses_other_channels(training, which):
    for device in ("cpu", "meta"):
        values = [torch.ones(5 if i == which else 4, device=device) for i in range(4)]
        with pytest.raises(RuntimeError):
            functional.batch_norm(torch.ones(INPUT, device=device), *values, training=training)


def lazy_copies(*tensors):
    return [torch._lazy_clone(t).requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("ours", [True, False], ids=["convext", "torch"])
def test_copy_on_write_tensors_stay_uncopied(ours, device):
    """Kernels that only read an operand do not ask for it as if they wrote."""
    conv2d, batch_norm = (
        (functional.conv2d, functional.batch_norm) if ours else (F.conv2d, F.batch_norm)
    )
    x = torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    w = torch.randn(6, 4, 3, 2, device=device, requires_grad=True)
    given = lazy_copies(x, w, torch.ones(6, device=device, requires_grad=True))
    output = conv2d(*given)
    (gradient,) = lazy_copies(torch.ones_like(output))
    torch.autograd.grad(output, given, gradient)
    assert all(torch._C._is_cow_tensor(t) for t in (*given, gradient))

    ones = torch.ones(4, device=device)
    for training in (True, False):
        given = lazy_copies(x, ones, ones, ones, ones)
        output = batch_norm(*given, training=training)
        (gradient,) = lazy_copies(torch.ones_like(output))
        torch.autograd.grad(output, given[0], gradient)
        # In training the running statistics are written.
        read = [given[0], *given[3:], gradient] + ([] if training else given[1:3])
        assert all(torch._C._is_cow_tensor(t) for t in read)


def test_no_warnings(device):
    """Neither a forward nor a backward pass warns of anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(convext).to(device)(torch.randn(2, 3, 8, 7, device=device)).sum().backward()
