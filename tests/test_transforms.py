"""torch.func's transforms and forward-mode differentiation, ours beside PyTorch's convolution."""

import itertools

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F
from transform_words import WORDS, apply_word, joined, split

from convext import functional

SETTINGS = {
    "plain": ((2, 4, 6, 5), (6, 4, 3, 2), {}),
    "all": (
        (2, 4, 8, 7),
        (6, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    ),
    "depthwise": ((3, 3, 5, 6), (3, 1, 2, 3), {"padding": (1, 0), "groups": 3}),
}


def values(size):
    return torch.randn(size, dtype=torch.float64)


def both(transform, settings):
    """What a transform makes of our convolution, and of PyTorch's."""
    return [
        transform(lambda *operands, f=f: f(*operands, **settings))
        for f in (functional.conv2d, F.conv2d)
    ]


@pytest.fixture(params=SETTINGS)
def problem(request):
    input_size, weight_size, settings = SETTINGS[request.param]
    return values(input_size), values(weight_size), values(weight_size[0]), settings


def loss(f):
    return lambda *operands: (f(*operands) ** 3).sum()


TRANSFORMS = {
    "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2)),
    "grad of grad": lambda f: func.grad(
        lambda *o: sum((g**2).sum() for g in func.grad(loss(f), argnums=(0, 1, 2))(*o)),
        argnums=(0, 1, 2),
    ),
    "vjp": lambda f: lambda *o: func.vjp(f, *o)[1](torch.ones_like(f(*o))),
    "jvp": lambda f: lambda *o: func.jvp(f, o, tuple(torch.sin(t) for t in o)),
    "jvp of grad": lambda f: (
        lambda *o: func.jvp(func.grad(loss(f), argnums=(0, 1)), o, tuple(torch.cos(t) for t in o))
    ),
    "jacrev": lambda f: func.jacrev(f, argnums=1),
    "jacfwd": lambda f: func.jacfwd(f, argnums=1),
    "hessian": lambda f: func.hessian(lambda w, x: loss(f)(x, w)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_torch(name, problem):
    x, w, b, settings = problem
    if name == "hessian":
        x, operands = x[:1], (w, x[:1])
    else:
        operands = (x, w, b)
    ours, stock = both(TRANSFORMS[name], settings)
    torch.testing.assert_close(ours(*operands), stock(*operands))


@pytest.mark.parametrize(
    "in_dims",
    [
        dims
        for dims in itertools.product((None, 0, 2), repeat=3)
        if any(d is not None for d in dims)
    ],
    ids=str,
)
def test_vmap_over_any_axis(in_dims, problem):
    x, w, b, settings = problem
    operands = [
        t if dim is None else values((5, *t.shape)).movedim(0, min(dim, t.dim()))
        for t, dim in zip((x, w, b), in_dims, strict=True)
    ]
    dims = tuple(
        None if dim is None else min(dim, t.dim())
        for t, dim in zip((x, w, b), in_dims, strict=True)
    )
    ours, stock = both(lambda f: func.vmap(f, dims), settings)
    torch.testing.assert_close(ours(*operands), stock(*operands))
    ours, stock = both(lambda f: func.vmap(func.grad(loss(f), argnums=(0, 1, 2)), dims), settings)
    torch.testing.assert_close(ours(*operands), stock(*operands))


def test_gradient_of_each_sample(problem):
    x, w, b, settings = problem

    def per_sample(f):
        def one(w, b, x):
            return loss(f)(x[None], w, b)

        return lambda: func.vmap(func.grad(one, argnums=(0, 1)), (None, None, 0))(w, b, x)

    ours, stock = both(per_sample, settings)
    torch.testing.assert_close(ours(), stock())


def test_forward_mode(problem):
    x, w, b, settings = problem

    def tangent(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.sin(t)) for t in (x, w, b)]
            return forward_ad.unpack_dual(f(*duals))

    ours, stock = both(tangent, settings)
    torch.testing.assert_close(ours.primal, stock.primal)
    torch.testing.assert_close(ours.tangent, stock.tangent)
    assert torch.autograd.gradcheck(
        lambda *o: functional.conv2d(*o, **settings),
        [t.clone().requires_grad_() for t in (x, w, b)],
        check_forward_ad=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("word", WORDS)
def test_any_composition(word, problem):
    *operands, settings = problem
    sizes = [t.shape for t in operands]
    z = joined(sizes)
    ours, stock = both(
        lambda f: apply_word(word, lambda z: f(*split(z, sizes)))(z),
        settings,
    )
    assert stock.abs().max() > 0
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9 * stock.abs().max().item())


def test_vectorised_derivatives_without_torch_func(problem):
    """torch.autograd's own batching meets the C++ Functions."""
    x, w, b, settings = problem

    def derivatives(f):
        given = {"vectorize": True}
        jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
        return (
            jacobian(lambda w: f(x, w, b), w, **given),
            jacobian(lambda w: f(x, w, b), w, strategy="forward-mode", **given),
            hessian(lambda w: loss(f)(x[:1], w), w, **given),
            hessian(
                lambda w: loss(f)(x[:1], w), w, outer_jacobian_strategy="forward-mode", **given
            ),
        )

    ours, stock = both(derivatives, settings)
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("where", ["around", "within"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(problem, dtype, where, device):
    """Casts are differentiated through: the gradients of a plain call, in the same dtypes.

    (Not PyTorch's: on CPU its convolution forgets about autocast under vmap.)
    """
    x, w, b, settings = problem
    x, w, b = (t.float().to(device) for t in (x, w, b))

    def f(x, w, b):
        with torch.autocast(device, dtype=dtype):
            output = functional.conv2d(x, w, b, **settings)
        assert output.dtype == dtype
        return output

    def cubes(x, w, b):
        return f(x, w, b).float().pow(3).mean()

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    plain = torch.autograd.grad(cubes(*leaves), leaves)
    tangents = tuple(torch.sin(t) for t in (x, w, b))
    with torch.autocast(device, dtype=dtype, enabled=where == "around"):
        gradients = func.grad(cubes, (0, 1, 2))(x, w, b)
        _, slope = func.jvp(cubes, (x, w, b), tangents)
        per_sample = func.vmap(func.grad(lambda w, x: f(x[None], w, b).float().sum()), (None, 0))(
            w, x
        )
    tolerance = 16 * torch.finfo(dtype).eps
    for got, expected in zip(gradients, plain, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )
    terms = [(g * t).sum() for g, t in zip(plain, tangents, strict=True)]
    room = tolerance * sum((g * t).abs().sum() for g, t in zip(plain, tangents, strict=True))
    assert abs(slope - sum(terms)) <= room
    whole = torch.autograd.grad(f(*leaves).float().sum(), leaves[1])[0]
    torch.testing.assert_close(
        per_sample.sum(0), whole, rtol=tolerance, atol=tolerance * whole.abs().max().item()
    )


def test_autocast_leaves_float64_alone_under_transforms(device):
    x, w = values((1, 1, 3, 3)).to(device), values((1, 1, 2, 2)).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert func.vmap(functional.conv2d, (0, None))(x[None], w).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert (
                func.vmap(functional.conv2d)(x[None].float(), w[None].float()).dtype
                == torch.float32
            )


def test_functionalize_is_refused():
    """torch has no rule for custom Functions there; loud."""
    with pytest.raises(RuntimeError, match="Functionalize rule"):
        func.functionalize(functional.conv2d)(values((1, 1, 3, 3)), values((1, 1, 2, 2)))
