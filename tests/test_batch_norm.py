"""Batch norm against `torch.nn.functional.batch_norm`, plain loops and numerical derivatives."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import convext
from convext.functional import batch_norm

ops = torch.ops.convext
ISAS = convext._C.cpu_isas()
HALF = (torch.bfloat16, torch.float16)

# Ranks 2 to 5; pixels 1, 4, 16, 49, 196 and odd ones; channels below, at and above a
# vector's lanes; row counts on both sides of where the kernels cut.
SHAPES = [
    (2, 1),
    (33, 3),
    (600, 17),
    (33, 8, 1),
    (4, 64, 2),
    (33, 17, 2, 2),
    (2, 64, 4, 4),
    (33, 8, 7, 7),
    (33, 3, 14, 14),
    (1, 3, 14, 14),
    (2, 8, 5, 3),
    (2, 3, 23, 27),
    (40, 1, 23, 23),
    (1, 600, 3, 1),
    (2, 70, 3, 1, 5),
    # Spans of pixels: too short by one, of 1 lane more than the sums have, of one chain and of one
    # lane more, of a few more than the kernels take at a time; images on both sides of the 8 that a
    # chain takes.
    (3, 5, 31),
    (17, 3, 3, 11),
    (7, 2, 8, 8),
    (2, 3, 512),
    (1, 2, 19, 27),
    (1, 2, 17, 241),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]


# Channels that a cache holds some of, only one of and not even one of, as spans and as columns.
LARGE_SHAPES = [
    (10, 40, 20, 20),
    (8, 2, 112, 113),
    (40, 2, 60, 61),
    (640, 3, 14, 14),
    (150, 600),
    (2100, 70),
    (300, 40, 5, 5),
]


def formats(shape):
    """Memory formats that a tensor of this shape can have."""
    last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *last.get(len(shape), [])]


def example(shape, dtype=torch.float64, affine=True, seed=0):
    """Input, grad_output, weight, bias, running_mean, running_var."""
    random = torch.Generator().manual_seed(seed)

    def values(size, scale, shift):
        return (torch.rand(size, generator=random, dtype=torch.float64) * scale + shift).to(dtype)

    channels = shape[1]
    weight, bias = (values(channels, 1, 0.5), values(channels, 2, -1)) if affine else (None, None)
    return (
        (torch.randn(shape, generator=random, dtype=torch.float64) * 2 + 3).to(dtype),
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype),
        weight,
        bias,
        values(channels, 6, 0),
        values(channels, 2, 0.5),
    )


def run(function, arguments, training, device="cpu"):
    """Everything that a forward and a backward on a device leave behind, by name, on the CPU."""
    x, grad_output, weight, bias, mean, var = (
        None if t is None else t.detach().to(device, copy=True) for t in arguments
    )
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    output = function(x, mean, var, weight, bias, training, 0.3, 1e-3)
    output.backward(grad_output)
    results = {"output": output.detach(), "running_mean": mean, "running_var": var}
    results |= {name: t.grad for name, t in leaves.items()}
    return {name: t.cpu() for name, t in results.items()}


def error(got, expected):
    """Largest difference."""
    return (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0


def widen(arguments):
    return [None if t is None else t.double() for t in arguments]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_equals_torch_in_float64(device, isa, shape, training, affine):
    for memory_format in formats(shape):
        x, grad_output, *rest = example(shape, affine=affine)
        arguments = [x.to(memory_format=memory_format), grad_output, *rest]
        got = run(batch_norm, arguments, training, device)
        expected = run(F.batch_norm, arguments, training)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=name)
        if x.numel():
            assert got["output"].is_contiguous(memory_format=memory_format)
            assert got["grad_input"].is_contiguous(memory_format=memory_format)


# A few roundings of a value of the order of 10 (the sums of a batch are larger, hence rtol).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE_SHAPES], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_dtype_within_its_tolerance(device, isa, shape, training, dtype):
    tolerance = TOLERANCE[dtype]
    for memory_format, wide in itertools.product(formats(shape), [False, True]):
        if wide and dtype not in HALF:
            continue
        x, grad_output, *rest = example(shape, dtype)
        # A 16-bit input goes with parameters of its dtype or of float32.
        rest = [t.float() for t in rest] if wide else rest
        arguments = [x.to(memory_format=memory_format), grad_output, *rest]
        got = run(batch_norm, arguments, training, device)
        stock = run(F.batch_norm, arguments, training)
        exact = run(F.batch_norm, widen(arguments), training)
        for name, value in got.items():
            assert value.dtype == stock[name].dtype, name
            scale = 4 * (1 + (exact[name].abs().max().item() if exact[name].numel() else 0))
            assert error(value, exact[name]) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("mean", "std"), [(0, 1), (3, 2), (1e4, 1e-2), (-1e3, 1), (1e-3, 1e3)], ids=str
)
@pytest.mark.parametrize("outlier", [False, True], ids=["plain", "outlier"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_float32_error_is_no_larger_than_torch(device, isa, mean, std, outlier, training):
    for shape, memory_format in [
        ((64, 8, 14, 14), torch.contiguous_format),
        ((64, 8, 14, 14), torch.channels_last),
        ((3, 3, 40, 40), torch.contiguous_format),
        ((128, 64), torch.contiguous_format),
        ((33, 64, 2, 2), torch.contiguous_format),
        ((4, 3, 33, 40), torch.contiguous_format),
    ]:
        x, grad_output, weight, bias, *_ = example(shape, torch.float32)
        x = ((x - 3) / 2 * std + mean).to(memory_format=memory_format)
        if outlier:  # a first image unlike the others
            x[0] = 0
        running = torch.full_like(weight, mean), torch.full_like(weight, std**2)
        arguments = [x, grad_output, weight, bias, *running]
        exact = run(F.batch_norm, widen(arguments), training)
        got, stock = (run(f, arguments, training, device) for f in (batch_norm, F.batch_norm))
        for name, value in got.items():
            # One rounding of a result; a mean near 0 is as good as its distance in deviations.
            size = exact[name].abs().max().item() + (std / 10 if name == "running_mean" else 0)
            limit = 2 * error(stock[name], exact[name]) + torch.finfo(x.dtype).eps * size
            assert error(value, exact[name]) <= limit, (name, shape, memory_format)


def by_loops(x, grad_output, weight, bias, eps):
    """Batch norm in training, from the definition, in plain Python: output and three gradients."""
    batch, channels, pixels = x.shape
    output, grad_input = torch.empty_like(x), torch.empty_like(x)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    for c in range(channels):
        places = [(n, c, p) for n in range(batch) for p in range(pixels)]
        values = [x[i].item() for i in places]
        grads = [grad_output[i].item() for i in places]
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        r = 1 / math.sqrt(var + eps)
        normal = [(v - mean) * r for v in values]
        grad_weight[c] = math.fsum(g * y for g, y in zip(grads, normal, strict=True))
        grad_bias[c] = math.fsum(grads)
        for i, g, y in zip(places, grads, normal, strict=True):
            output[i] = y * weight[c] + bias[c]
            centred = g - grad_bias[c] / len(values) - y * grad_weight[c] / len(values)
            grad_input[i] = weight[c] * r * centred
    return output, grad_input, grad_weight, grad_bias


@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 9, 33)], ids=str)
def test_equals_plain_loops(isa, shape):
    x, grad_output, weight, bias, *_ = example(shape)
    output, mean, var = ops.batch_norm_train(x, weight, bias, 1e-5)
    gradients = ops.batch_norm_backward(grad_output, x, mean, var, weight, 1e-5, True)
    expected = by_loops(x, grad_output, weight, bias, 1e-5)
    torch.testing.assert_close((output, *gradients), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [s for s in [*SHAPES, *LARGE_SHAPES] if len(s) == 4], ids=str)
def test_bias_gradient_is_a_sum(device, isa, shape, dtype):
    for memory_format in formats(shape):
        grad_output = example(shape, dtype)[1].to(memory_format=memory_format)
        got = ops.conv2d_backward_bias(grad_output.to(device)).cpu()
        exact = grad_output.double().sum((0, 2, 3))
        assert (got.dtype, got.shape) == (dtype, (shape[1],))
        scale = grad_output.double().abs().sum((0, 2, 3))
        # In float64 the sum that is compared with has rounded as much.
        error = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)
        assert ((got.double() - exact).abs() <= error * scale).all()


def test_any_strides():
    x = torch.randn(6, 10, 8, 8, dtype=torch.float64)
    views = {
        "sliced": x[::2, 1::3, 1:, ::2],
        "transposed": x.transpose(2, 3),
        "swapped": x.transpose(0, 1),
        "expanded batch": x[:1].expand(4, -1, -1, -1),
        "expanded channels": x[:, :1].expand(-1, 5, -1, -1),
        "flipped": x.flip(3)[:, :, 1:],
    }
    for name, view in views.items():
        for training, last in itertools.product([True, False], [True, False]):
            _, grad_output, *rest = example(tuple(view.shape))
            grad_output = grad_output.to(memory_format=formats(view.shape)[last])
            results = []
            for function in (batch_norm, F.batch_norm):
                leaf = view.detach().requires_grad_()
                output = function(leaf, rest[2].clone(), rest[3].clone(), *rest[:2], training)
                results.append((output, *torch.autograd.grad(output, leaf, grad_output)))
            torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11, msg=name)


def test_views_at_any_address():
    whole = example((3, 2, 6, 7))[0].float().flatten()
    for start in range(20):
        x = whole[start : start + 210].view(3, 2, 5, 7)
        results = [f(x, None, None, training=True) for f in (batch_norm, F.batch_norm)]
        torch.testing.assert_close(*results)
        assert torch.equal(results[0], batch_norm(x.clone(), None, None, training=True))


def test_running_statistics_may_be_absent_one_by_one():
    x, *_, mean, var = example((4, 3, 5))
    expected = F.batch_norm(x, None, None, training=True)
    for stats in [(None, None), (mean, None), (None, var)]:
        torch.testing.assert_close(batch_norm(x, *stats, training=True), expected)


@pytest.mark.parametrize("pixels", [5, 7], ids=["columns", "spans"])
def test_not_a_number_and_infinity_stay_in_their_channel(device, isa, pixels):
    for value in (math.nan, math.inf):
        x = torch.randn(4, 3, pixels, pixels, device=device)
        x[1, 1, -1, -1] = value
        got, expected = (f(x, None, None, training=True) for f in (batch_norm, F.batch_norm))
        torch.testing.assert_close(got, expected, equal_nan=True)


def cases_of_derivatives():
    """Functions of (input, weight, bias), each None where absent, in training and eval."""
    for training in (True, False):
        for weight, bias in itertools.product([True, False], repeat=2):
            yield training, weight, bias


@pytest.mark.parametrize(("training", "with_weight", "with_bias"), list(cases_of_derivatives()))
def test_gradients_of_first_and_second_order(device, training, with_weight, with_bias):
    x, _, weight, bias, mean, var = (t.to(device) for t in example((3, 2, 2, 2)))
    leaves = [x, *([weight] if with_weight else []), *([bias] if with_bias else [])]
    leaves = [t.requires_grad_() for t in leaves]

    def function(x, *rest):
        rest = list(rest)
        weight = rest.pop(0) if with_weight else None
        bias = rest.pop(0) if with_bias else None
        stats = (None, None) if training else (mean, var)
        return batch_norm(x, *stats, weight, bias, training)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradients_of_third_order(training, affine):
    x, _, weight, _, mean, var = example((3, 2, 2), affine=affine)

    def second(x, *weight):
        stats = (None, None) if training else (mean, var)
        output = batch_norm(x, *stats, *(weight or [None]), None, training)
        (first,) = torch.autograd.grad((output**3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), (x, *weight), create_graph=True)

    leaves = [t.requires_grad_() for t in (x, weight) if t is not None]
    assert torch.autograd.gradcheck(second, leaves)


def test_gradient_of_bias_gradient():
    grad_output = example((2, 3, 2, 2))[1].requires_grad_()
    assert torch.autograd.gradcheck(ops.conv2d_backward_bias, grad_output)
    assert torch.autograd.gradgradcheck(ops.conv2d_backward_bias, grad_output)


def test_statistics_carry_no_gradient():
    x, _, weight, bias, *_ = (t.requires_grad_() for t in example((4, 3, 5)))
    output, mean, var = ops.batch_norm_train(x, weight, bias, 1e-5)
    assert output.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads_and_isa(dtype):
    threads, before = torch.get_num_threads(), convext._C.cpu_isa()
    shapes = [(600, 8, 14, 14), (3, 8, 90, 91), (9000, 70), (300, 17, 5, 5), *LARGE_SHAPES]
    try:
        for shape in shapes:
            for memory_format in formats(shape):
                x, grad_output, weight, bias, *_ = example(shape, dtype)
                x = x.to(memory_format=memory_format)
                expected = None
                for isa, count in [*((isa, 1) for isa in ISAS), *((before, n) for n in (2, 3, 8))]:
                    convext._C.set_cpu_isa(isa)
                    torch.set_num_threads(count)
                    output, mean, var = ops.batch_norm_train(x, weight, bias, 1e-5)
                    results = (
                        *(output, mean, var),
                        *ops.batch_norm_backward(grad_output, x, mean, var, weight, 1e-5, True),
                        ops.batch_norm_eval(x, mean, var, None, None, 1e-5),
                    )
                    expected = expected or results
                    for one, other in zip(results, expected, strict=True):
                        assert torch.equal(one, other), (shape, isa, count)
    finally:
        torch.set_num_threads(threads)
        convext._C.set_cpu_isa(before)


def shrunk(size):
    tensor = torch.ones(size)
    tensor.untyped_storage().resize_(4)
    return tensor


X = torch.randn(2, 3, 4, 4)
C3, C4 = torch.ones(3), torch.ones(4)
# What to change about (input, running_mean, running_var, weight, bias), and words of the message.
BAD = {
    "integer": ({"input": X.int()}, "input must have dtype"),
    "complex": ({"input": X.to(torch.complex64)}, "input must have dtype"),
    "sparse": ({"input": X.to_sparse()}, "input must be a dense"),
    "sparse weight": ({"weight": C3.to_sparse()}, "weight must be a dense"),
    "one axis": ({"input": C3}, r"expected input of size \(N, C, \*\)"),
    "no axis": ({"input": torch.ones(())}, r"expected input of size \(N, C, \*\)"),
    "weight size": ({"weight": C4}, "weight should contain 3 elements not 4"),
    "weight scalar": ({"weight": torch.ones(())}, "weight should contain 3 elements not 1"),
    "bias size": ({"bias": C4}, "bias should contain 3 elements not 4"),
    "mean size": ({"running_mean": C4}, "mean should contain 3 elements"),
    "var size": ({"running_var": C4}, "var should contain 3 elements"),
    "mean axes": ({"running_mean": torch.ones(3, 1)}, "mean should"),
    "weight dtype": ({"weight": C3.double()}, "weight type .* should be the input type"),
    "bias dtype": ({"bias": C3.double()}, "bias type .* should be the input type"),
    "weight device": ({"weight": torch.ones(3, device="meta")}, "same device"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_torch_does(name, training):
    changes, message = BAD[name]
    good = {"input": X, "running_mean": C3, "running_var": C3, "weight": C3, "bias": C3}
    # torch's own slip in one case: it asks a 0-dimensional tensor for its batch size.
    kind = IndexError if name == "no axis" and training else RuntimeError
    with pytest.raises(kind):
        F.batch_norm(**{k: t.clone() for k, t in (good | changes).items()}, training=training)
    with pytest.raises(RuntimeError, match=message):
        batch_norm(**{k: t.clone() for k, t in (good | changes).items()}, training=training)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.ones(1, 3), "training": True}, "more than 1 value per channel"),
        ({"input": torch.ones(1, 3, 1, 1), "training": True}, "more than 1 value per channel"),
        ({"input": X, "training": True, "eps": 0.0}, "eps must be positive during training"),
        ({"input": X, "training": False, "eps": -1.0}, "eps must be non-negative"),
    ],
)
def test_bad_values_raise_as_torch_does(arguments, message):
    for function in (F.batch_norm, batch_norm):
        with pytest.raises(ValueError, match=message):
            function(running_mean=C3, running_var=C3, **arguments)


def test_bad_arguments_of_raw_ops():
    backward = {
        "grad_output": X,
        "input": X,
        "mean": C3,
        "var": C3,
        "weight": C3,
        "eps": 1e-5,
        "training": True,
    }
    for name, value in [
        ("grad_output", X[:1]),
        ("grad_output", X.double()),
        ("grad_output", X.to_mkldnn()),
        ("input", torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)),
        ("mean", C4),
        ("mean", C3.double()),
        ("var", C3.reshape(3, 1)),
        ("var", shrunk(3)),
        ("weight", C3.bfloat16()),
        ("input", shrunk((2, 3, 4, 4))),
    ]:
        with pytest.raises(RuntimeError, match=name):
            ops.batch_norm_backward(**(backward | {name: value}))
    for name in ("grad_output", "input", "mean", "weight"):
        for other in (torch.ones(3, device="meta"), torch.nested.nested_tensor([C3])):
            with pytest.raises(RuntimeError):
                ops.batch_norm_backward(**(backward | {name: other}))
    with pytest.raises(RuntimeError, match=r"mean type .* and var type"):
        ops.batch_norm_eval(X.half(), C3, C3.half(), None, None, 1e-5)
    for bad in (X[0], X.int(), X.to_sparse(), shrunk((2, 3, 4, 4))):
        with pytest.raises(RuntimeError, match="grad_output"):
            ops.conv2d_backward_bias(bad)
