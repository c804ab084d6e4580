"""torch.func's transforms and forward-mode differentiation, our batch norm beside PyTorch's."""

import itertools

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F
from transform_words import WORDS, apply_word, joined, split

from convext.functional import batch_norm

AFFINE = list(itertools.product([True, False], repeat=2))
C = 3


def values(*size):
    return torch.randn(size, dtype=torch.float64)


def statistics():
    return values(C), torch.rand(C, dtype=torch.float64) + 0.5


def call(f, operands, affine, training, stats=None):
    """f of (input, weight, bias), those of the latter two that there are."""
    x, *rest = operands
    weight = rest.pop(0) if affine[0] else None
    bias = rest.pop(0) if affine[1] else None
    stats = (None, None) if stats is None else [t.clone() for t in stats]
    return f(x, *stats, weight, bias, training, 0.3, 1e-3)


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=AFFINE, ids=["affine", "weight", "bias", "plain"])
def affine(request):
    return request.param


@pytest.fixture
def problem(training, affine):
    """Operands, and what makes a function of them from ours or PyTorch's batch norm."""
    operands = [values(3, C, 2, 4), *(values(C) for given in affine if given)]
    stats = statistics()
    return operands, lambda f: lambda *o: call(f, o, affine, training, stats)


def loss(f):
    return lambda *operands: (f(*operands) ** 3).sum()


def every(operands):
    return tuple(range(len(operands)))


TRANSFORMS = {
    "grad": lambda f, o: func.grad(loss(f), every(o))(*o),
    "grad of grad": lambda f, o: func.grad(
        lambda *o: sum((g**2).sum() for g in func.grad(loss(f), every(o))(*o)), every(o)
    )(*o),
    "vjp": lambda f, o: func.vjp(f, *o)[1](torch.cos(o[0])),
    "jvp": lambda f, o: func.jvp(f, o, tuple(torch.sin(t) for t in o)),
    "jvp of one": lambda f, o: func.jvp(lambda t: f(*o[:-1], t), o[-1:], (torch.sin(o[-1]),)),
    "jvp of grad": lambda f, o: func.jvp(
        func.grad(loss(f), every(o)), o, tuple(torch.cos(t) for t in o)
    ),
    "linearize": lambda f, o: func.linearize(f, *o)[1](*(torch.sin(t) for t in o)),
    "jacrev": lambda f, o: func.jacrev(f, every(o))(*o),
    "jacfwd": lambda f, o: func.jacfwd(f, every(o))(*o),
    "hessian": lambda f, o: func.hessian(loss(f), every(o))(*o),
    "hessian in reverse": lambda f, o: func.jacrev(func.jacrev(loss(f)), every(o))(*o),
}


def written_out(x, mean, var, weight, bias, training, momentum, eps):
    """Batch norm of (N, C, H, W), in operations that PyTorch differentiates to any order.

    F.batch_norm is no oracle for all of them (torch 2.13): in training its third derivative and the
    tangent of its tangent lack terms, and so do blocks of its Hessian under vmap; with a bias but
    no weight its second derivative raises.
    """
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    mean, var, weight, bias = (t.reshape(-1, 1, 1) for t in (mean, var, weight, bias))
    return (x - mean) * (var + eps).rsqrt() * weight + bias


@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_torch(name, affine, problem):
    operands, function = problem
    oracles = [written_out]
    if "hessian" not in name and (name, *affine) != ("grad of grad", False, True):
        oracles.append(F.batch_norm)
    ours = TRANSFORMS[name](function(batch_norm), tuple(operands))
    for oracle in oracles:
        torch.testing.assert_close(ours, TRANSFORMS[name](function(oracle), tuple(operands)))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("affine", AFFINE[::3], ids=["affine", "plain"], indirect=True)
def test_any_composition(word, affine, training):
    sizes = [(3, C, 2, 4), *((C,) for given in affine if given)]
    stats = None if training else statistics()
    z = joined(sizes)
    ours, exact = (
        apply_word(word, lambda z, f=f: call(f, split(z, sizes), affine, training, stats))(z)
        for f in (batch_norm, written_out)
    )
    assert exact.abs().max() > 0
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8 * exact.abs().max().item())


def test_nested_dual_levels_are_refused(problem):
    operands, function = problem
    f = function(batch_norm)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode"):
        func.jvp(f, tuple(operands), tuple(operands))


def batched(tensors, in_dims):
    """Each tensor with an axis of 5 at its in_dim."""
    return [
        t if dim is None else values(5, *t.shape).abs().movedim(0, dim)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]


# Of (input, running_mean, running_var, weight, bias).
IN_DIMS = [
    dims
    for dims in itertools.product((None, 0, 2), (None, 0, 1), (None, 1), (None, 0), (None, 0, 1))
    if any(d is not None for d in dims)
]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_over_any_axis(in_dims, training):
    x, mean, var, weight, bias = values(4, C, 2, 3), *statistics(), values(C), values(C)
    if training:  # what is kept of the statistics has a test of its own
        mean, var, in_dims = None, None, (in_dims[0], None, None, *in_dims[3:])
        if in_dims == (None,) * 5:
            in_dims = (4, None, None, 1, 1)
    operands = batched((x, mean, var, weight, bias), in_dims)
    results = []
    for f in (batch_norm, F.batch_norm):
        plain = func.vmap(lambda *o, f=f: f(*o, training), in_dims)
        grads = func.vmap(func.grad(loss(lambda *o, f=f: f(*o, training)), (0, 3, 4)), in_dims)
        results.append((plain(*operands), grads(*operands)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(4, C), (4, C, 5), (2, C, 2, 1, 3), (1, C, 2, 2)], ids=str)
def test_vmap_of_any_rank(shape, training):
    """(1, C, H, W) is the gradient of each sample; a batch of them normalises by its own pixels."""
    x, weight, bias = values(6, *shape), values(C), values(C)
    stats = (None, None) if training else statistics()

    def of_sample(f):
        one = loss(lambda w, b, x: f(x, *stats, w, b, training))
        return func.vmap(func.grad(one, (0, 1, 2)), (None, None, 0))(weight, bias, x)

    torch.testing.assert_close(of_sample(batch_norm), of_sample(F.batch_norm))


def test_nested_vmap(training):
    x, weight = values(2, 5, 4, C, 2, 3), values(5, C)
    stats = (None, None) if training else statistics()

    def nested(f):
        inner = func.vmap(lambda x, w: f(x, *stats, w, None, training), (0, 0))
        return func.vmap(inner, (0, None))(x, weight)

    torch.testing.assert_close(nested(batch_norm), nested(F.batch_norm))


def test_forward_mode(problem):
    operands, function = problem

    def tangent(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.sin(t)) for t in operands]
            return tuple(forward_ad.unpack_dual(function(f)(*duals)))

    torch.testing.assert_close(tangent(batch_norm), tangent(F.batch_norm))
    leaves = [t.clone().requires_grad_() for t in operands]
    options = {"check_batched_grad": True, "check_forward_ad": True}
    assert torch.autograd.gradcheck(
        function(batch_norm), leaves, check_batched_forward_grad=True, **options
    )
    assert torch.autograd.gradgradcheck(
        function(batch_norm), leaves, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["float32 parameters", "16-bit parameters"])
def test_16_bit_inputs(dtype, wide, training):
    x, weight, bias = (t.to(dtype) for t in (values(4, C, 3, 5), values(C), values(C)))
    stats = [t.to(dtype) for t in statistics()]
    if wide:
        weight, bias, *stats = (t.float() for t in (weight, bias, *stats))

    def results(f, *tensors):
        stats = tensors[3:]
        tangents = tuple(torch.sin(t) for t in tensors[:3])

        def cubes(*o):
            return (f(o[0], *(stats or (None, None)), *o[1:], training).double() ** 3).mean()

        def squares(*o):
            return sum((g.double() ** 2).sum() for g in func.grad(cubes, (0, 1, 2))(*o))

        return [
            *func.grad(cubes, (0, 1, 2))(*tensors[:3]),
            *func.grad(squares, (0, 1, 2))(*tensors[:3]),
            *func.jvp(func.grad(cubes, (0, 1, 2)), tensors[:3], tangents)[1],
            *func.jvp(cubes, tensors[:3], tangents),
        ]

    operands = (x, weight, bias, *(() if training else stats))
    ours, stock = results(batch_norm, *operands), results(F.batch_norm, *operands)
    exact = results(F.batch_norm, *(t.double() for t in operands))
    for mine, other, true in zip(ours, stock, exact, strict=True):
        assert mine.dtype == other.dtype
        room = 16 * torch.finfo(dtype).eps * (1 + true.abs().max())
        assert (mine.double() - true).abs().max() <= room
    stats = (None, None) if training else stats
    many = func.vmap(lambda x: batch_norm(x, *stats, weight, bias, training))(torch.stack([x, x]))
    assert many.dtype == dtype
    assert torch.equal(many[1], batch_norm(x, *stats, weight, bias, training))


# --------------------------------------------------------------------------------------------------
# Running statistics


def test_running_statistics_are_kept_under_transforms():
    x, weight = values(4, C, 3, 5), values(C)
    start = statistics()

    def kept(f, transform):
        mean, var = (t.clone() for t in start)
        transform(lambda x, w: f(x, mean, var, w, None, True, 0.3))
        return mean, var

    transforms = {
        "grad": lambda f: func.grad(loss(f), (0, 1))(x, weight),
        "jvp": lambda f: func.jvp(f, (x, weight), (x, weight)),
        "vmap over weight": lambda f: func.vmap(f, (None, 0))(x, torch.stack([weight, -weight])),
        "jvp of grad": lambda f: func.jvp(func.grad(loss(f)), (x, weight), (x, weight)),
        "forward_ad": lambda f: _dual(f, x, weight),
    }
    plain = kept(F.batch_norm, lambda f: f(x, weight))
    for name, transform in transforms.items():
        torch.testing.assert_close(kept(batch_norm, transform), plain, msg=name)
        torch.testing.assert_close(kept(F.batch_norm, transform), plain, msg=name)


def _dual(f, x, weight):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.sin(x)), weight)


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "grad of vmap", "vmap of vmap"])
@pytest.mark.parametrize("batched_input", [True, False], ids=["input too", "statistics only"])
def test_batched_running_statistics(transform, batched_input):
    """Each member of the batch keeps its own, wherever the axis is."""
    count = 4
    xs = values(count, 5, C, 2, 3)
    start = [torch.stack(pair) for pair in zip(*(statistics() for _ in range(count)), strict=True)]
    expected = [t.clone() for t in start]
    for i in range(count):
        F.batch_norm(xs[i if batched_input else 0], *(t[i] for t in expected), training=True)

    def step(x, mean, var):
        return batch_norm(x, mean, var, training=True).pow(3).sum()

    for axis in (0, 1):  # F.batch_norm keeps them for axis 0 only, without a word
        mean, var = (t.movedim(0, axis).clone(memory_format=torch.contiguous_format) for t in start)
        x, dims = (xs, (0, axis, axis)) if batched_input else (xs[0], (None, axis, axis))
        if transform == "vmap":
            func.vmap(step, dims)(x, mean, var)
        elif transform == "vmap of grad":
            func.vmap(func.grad(step), dims)(x, mean, var)
        elif transform == "grad of vmap":
            func.grad(lambda x: func.vmap(step, dims)(x, mean, var).sum())(x)  # noqa: B023
        else:
            square = [t.unflatten(axis, (2, 2)) for t in (mean, var)]
            x = xs.unflatten(0, (2, 2)) if batched_input else x
            inner = (0, 0, 0) if batched_input else (None, 0, 0)
            inner = (*inner[:1], axis, axis)
            func.vmap(func.vmap(step, inner), inner)(x, *square)
        got = [t.movedim(axis, 0) for t in (mean, var)]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batched_one", [None, 0, 1], ids=["neither", "mean", "var"])
def test_running_statistics_of_a_batch_need_a_batch(batched_one):
    start = [t.expand(2, C).clone() if i == batched_one else t for i, t in enumerate(statistics())]
    stats = [t.clone() for t in start]
    dims = (0, *(0 if i == batched_one else None for i in range(2)))
    for f in (batch_norm, F.batch_norm):
        with pytest.raises(RuntimeError, match="batched"):
            func.vmap(lambda *o, f=f: f(*o, training=True), dims)(values(2, 4, C, 3), *stats)
    torch.testing.assert_close(stats, start, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1], ids=["running_mean", "running_var"])
def test_no_derivative_by_running_statistics(which, training):
    """PyTorch refuses the gradient, and takes the tangent for zero; neither is a zero here."""
    x, stats = values(4, C, 3), statistics()

    def function(f):
        def of(t):
            given = [t if i == which else s.clone() for i, s in enumerate(stats)]
            return f(x, *given, training=training)

        return of

    t = stats[which].clone()
    for f in (batch_norm, F.batch_norm):
        with pytest.raises(RuntimeError, match="not differentiable with respect to"):
            func.grad(loss(function(f)))(t)
        with pytest.raises(RuntimeError, match="not differentiable with respect to"):
            function(f)(t.clone().requires_grad_())
        with torch.no_grad():
            function(f)(t.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="not differentiable with respect to"):
        func.jvp(function(batch_norm), (t,), (t,))
    with (
        pytest.raises(RuntimeError, match="not differentiable with respect to"),
        forward_ad.dual_level(),
    ):
        function(batch_norm)(forward_ad.make_dual(t, t))


# --------------------------------------------------------------------------------------------------
# The kernels at work, and errors


def test_first_order_passes_run_our_kernels(training):
    x, weight, bias = values(4, C, 3, 5), values(C), values(C)
    stats = (None, None) if training else statistics()

    def f(x, w, b):
        return batch_norm(x, *stats, w, b, training)

    passes = {
        "forward": (lambda: func.vmap(f, (0, None, None))(x[None], weight, bias), 1, 0),
        "gradient": (lambda: func.grad(loss(f), (0, 1, 2))(x, weight, bias), 1, 1),
        "tangent": (lambda: func.jvp(f, (x, weight, bias), (x, weight, bias)), 2, 1),
    }
    for name, (run, forwards, backwards) in passes.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        names = [event.name for event in profile.events()]
        forward = "train" if training else "eval"
        assert names.count(f"convext::batch_norm_{forward}") == forwards, name
        assert names.count("convext::batch_norm_backward") == backwards, name
        assert not [n for n in names if "batch_norm" in n and not n.startswith("convext::")], name


def test_errors_are_those_of_the_plain_call(training):
    x, stats = values(4, C, 3), statistics()
    bad = {
        "weight": {"weight": values(C + 1)},
        "bias": {"bias": values(C, 1)},
        "mean": {"running_mean": values(C + 1)},
        "more than 1 value": {"input": x[:1, :, :1]},
        "running_mean and running_var": {"running_mean": None},
        "input": {"input": x[0, 0]},
    }
    for name, changes in bad.items():
        if name == "more than 1 value" and not training:
            continue
        if name == "running_mean and running_var" and training:
            continue
        given = {"input": x, "running_mean": stats[0], "running_var": stats[1]} | changes
        x0 = given.pop("input")
        for transform in (
            lambda f, x: f(x),
            lambda f, x: func.grad(loss(f))(x),
            lambda f, x: func.jvp(f, (x,), (x,)),
        ):
            with pytest.raises((RuntimeError, ValueError), match=name):
                transform(lambda x: batch_norm(x, training=training, **given), x0)  # noqa: B023


def test_functionalize_is_refused(training):
    """torch has no rule for custom Functions there; loud."""
    x, stats = values(4, C, 3), statistics()
    with pytest.raises(RuntimeError, match="Functionalize rule"):
        func.functionalize(lambda x: batch_norm(x, *stats, training=training))(x)
