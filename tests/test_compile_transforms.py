"""torch.compile around and beneath torch.func's transforms: whole graphs, and eager's results."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F

from convext import functional


def values(*size):
    return torch.randn(size, dtype=torch.float64)


def conv2d(f):
    return lambda x, w: f(x, w, w[:, 0, 0, 0], (2, 1), (1, 2))


def batch_norm(training):
    def layer(f):
        def call(x, w):
            scale = w[:3, 0, 0, 0]
            if training:
                return f(x, None, None, scale, scale, True)
            return f(x, scale.detach(), scale.detach().square() + 1, scale, scale, False)

        return call

    return layer


LAYERS = {
    "conv2d": (conv2d, functional.conv2d, F.conv2d),
    "batch_norm in training": (batch_norm(True), functional.batch_norm, F.batch_norm),
    "batch_norm in eval": (batch_norm(False), functional.batch_norm, F.batch_norm),
}


def cubes(f):
    return lambda x, w: (f(x, w) ** 3).sum()


def several(names, f):
    """One function of (x, w) that gives the results of the transforms of these names."""

    def of_one(name, x, w):
        tangents = (torch.sin(x), torch.cos(w))
        return {
            "grad": lambda: func.grad(cubes(f), (0, 1))(x, w),
            "vmap": lambda: func.vmap(lambda x: f(x[None], w))(x),
            "per-sample": lambda: func.vmap(func.grad(lambda x: cubes(f)(x[None], w)))(x),
            "jvp": lambda: func.jvp(f, (x, w), tangents),
            "jvp of grad": lambda: func.jvp(func.grad(cubes(f), (0, 1)), (x, w), tangents),
            "jacrev": lambda: func.jacrev(lambda w: f(x, w).sum((0, 2, 3)))(w),
            "hessian": lambda: func.hessian(lambda w: cubes(f)(x, w))(w),
        }[name]()

    return lambda x, w: tuple(of_one(name, x, w) for name in names)


REVERSE, FORWARD = ("grad", "vmap", "per-sample", "jacrev"), ("jvp", "jvp of grad", "hessian")


@pytest.fixture(params=LAYERS)
def layer(request):
    """A function of (x, w) on our kernels, and on PyTorch's."""
    layer, ours, stock = LAYERS[request.param]
    torch._dynamo.reset()
    return layer(ours), layer(stock)


def operands(batch=2):
    return values(batch, 3, 4, 5), values(4, 3, 3, 2)


@pytest.mark.parametrize("names", [REVERSE, FORWARD], ids=["reverse", "forward"])
def test_compiles_as_one_graph(layer, names):
    ours, stock = (several(names, f) for f in layer)
    given = operands()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*given), stock(*given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), ("inductor", False)],
)
def test_compiles_both_layers_in_a_row(backend, dynamic):
    torch._dynamo.reset()

    def network(conv2d, batch_norm):
        return lambda x, w: batch_norm(conv2d(x, w), None, None, w[:, 0, 0, 0], training=True)

    ours = several(["per-sample"], network(functional.conv2d, functional.batch_norm))
    stock = several(["per-sample"], network(F.conv2d, F.batch_norm))
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        given = operands(batch)
        torch.testing.assert_close(compiled(*given), stock(*given))


def test_gradient_through_a_compiled_gradient(layer):
    ours, stock = (lambda x, w, f=f: func.grad(cubes(f))(x, w) for f in layer)
    leaves = [t.requires_grad_() for t in operands()]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, stock)
    )
    torch.testing.assert_close(got, expected)


def test_transforms_of_a_compiled_function(layer):
    ours, stock = layer
    given = operands()
    names = ("grad", "vmap", "jvp", "jvp of grad")
    for warm in (False, True):  # warm: there is code already, for calls without a transform
        compiled = torch.compile(ours, backend="aot_eager")
        if warm:
            compiled(*given)
        got, expected = (several(names, f)(*given) for f in (compiled, stock))
        torch.testing.assert_close(got, expected)


def test_dual_numbers_in_a_compiled_function(layer):
    """The compiler doesn't see the dual level around it: refused, never a lost tangent."""
    ours, stock = layer
    x, w = operands()

    def tangent(f):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.sin(x)), w)))

    for warm in (False, True):
        compiled = torch.compile(ours, backend="aot_eager")
        if warm:
            compiled(x, w)
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            tangent(compiled)
    inside = torch.compile(lambda: tangent(ours), backend="aot_eager")
    torch.testing.assert_close(inside(), tangent(stock))


def test_running_statistics_in_a_compiled_transform():
    torch._dynamo.reset()
    x, weight = values(4, 3, 5, 2), values(3)
    start = values(3), values(3).abs()

    def step(x, mean, var):
        def norm(w):
            return functional.batch_norm(x, mean, var, w, None, True, 0.3)

        return func.grad(lambda w: norm(w).pow(3).sum())(weight)

    eager, compiled = ([t.clone() for t in start] for _ in range(2))
    expected = step(x, *eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled)
    torch.testing.assert_close((got, compiled), (expected, eager))
    assert not torch.equal(eager[0], start[0])


def test_no_derivative_by_running_statistics_when_compiled():
    torch._dynamo.reset()
    x, mean, var = values(4, 3, 5), values(3), values(3).abs()

    def gradient(mean):
        return func.grad(lambda m: functional.batch_norm(x, m, var).pow(3).sum())(mean)

    with pytest.raises(RuntimeError, match="not differentiable with respect to running_mean"):
        torch.compile(gradient, backend="aot_eager")(mean)


def test_forward_mode_with_dynamic_sizes_is_right_or_refused():
    """torch lacks what nested forward mode asks of symbolic sizes, for its own layers too."""
    torch._dynamo.reset()
    f = several(("hessian",), batch_norm(True)(functional.batch_norm))
    given, got = operands(), None
    with contextlib.suppress(torch._dynamo.exc.TorchRuntimeError):
        got = torch.compile(f, backend="aot_eager", dynamic=True)(*given)
    if got is not None:
        torch.testing.assert_close(got, f(*given))


def test_importing_convext_does_not_import_the_compiler():
    program = "import sys, convext; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
