"""Batch norm, sums of channels and the fused block on CUDA, by the emulator, against PyTorch."""

import itertools

import pytest
import torch
from emulated_cuda import FORMATS, RELUS, Kernels
from problems import SMALL, Conv2dProblem
from reference import FLOATS, HALVES, operands
from torch import Tensor
from torch.nn import functional as F

# Ranks 2 and 4; elements side by side that do and do not fill vectors of 2 and 4; channels below,
# at and above what a block has columns for.
SHAPES = [
    (2, 1),
    (33, 3),
    (130, 17),
    (5, 64),
    (2, 300),
    (33, 8, 1, 1),
    (4, 64, 2, 1),
    (3, 17, 2, 2),
    (16, 64, 2, 2),
    (9, 8, 7, 7),
    (6, 16, 14, 14),
    (1, 5, 31, 1),
    (2, 3, 23, 27),
    (3, 1, 23, 23),
    (1, 12, 3, 1),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
    (1, 2, 1, 1),
]
# Where one part of the batch is not all of it: vectors and single elements, one part more and less,
# one channel, groups of channels the last of which is not whole.
LARGE_SHAPES = [
    (3, 2, 105, 105),
    (9, 2, 64, 60),
    (4, 1, 93, 89),
    (1, 2, 128, 256),
    (1, 2, 128, 257),
    (1100, 36, 2, 2),
    (4200, 35),
]
# A few roundings of a value of the order of 1; sums of a batch are compared in its scale.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
ALL_DTYPES = (*FLOATS, *HALVES)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layouts(shape) -> tuple[str, ...]:
    return tuple(FORMATS) if len(shape) == 4 else ("contiguous",)


def example(shape, dtype, layout="contiguous") -> dict[str, Tensor]:
    """Input, grad_output, weight, bias, mean and var; no weight is near 0, and the input is 0 in
    many places, as after a ReLU.
    """
    random = torch.Generator().manual_seed(sum(shape))
    tensors = {
        "input": F.relu(torch.randn(shape, generator=random) * 2 + 1),
        "grad_output": torch.randn(shape, generator=random),
        "weight": torch.rand(shape[1], generator=random) + 0.5,
        "bias": torch.rand(shape[1], generator=random) * 2 - 1,
        "mean": torch.rand(shape[1], generator=random) * 3,
        "var": torch.rand(shape[1], generator=random) + 0.5,
    }
    for name in ("input", "grad_output"):
        tensors[name] = tensors[name].to(dtype).contiguous(memory_format=FORMATS[layout])
    return {n: t if n in ("input", "grad_output") else t.to(sum_dtype(dtype))
            for n, t in tensors.items()}  # fmt: skip


def forward(x, mean, var, weight, bias, training, relu="none", eps=1e-5):
    """Batch norm by PyTorch, with the ReLU that batch norm's kernels compute in a forward pass."""
    y = F.batch_norm(x, mean, var, weight, bias, training, eps=eps)
    return F.relu(y) if relu == "after the norm" else y


def backward(data, training, relu="none", eps=1e-5) -> dict[str, Tensor]:
    """What the backward pass must give, by PyTorch and its derivatives."""
    leaves = [data[n].detach().requires_grad_() for n in ("input", "weight", "bias")]
    statistics = (None, None) if training else (data["mean"], data["var"])
    y = forward(leaves[0], *statistics, *leaves[1:], training, relu, eps)
    x, weight, bias = torch.autograd.grad(y, leaves, data["grad_output"])
    if relu == "before the norm":
        x = torch.where(data["input"] > 0, x, 0)
    over = [0, *range(2, x.dim())]
    return {"output": x, "grad_weight": weight, "grad_bias": bias, "grad_input_sum": x.sum(over)}


def widened(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in data.items()}


def check(got: Tensor, expected: Tensor, tolerance: float, size: float, message: object) -> None:
    error = (got.double() - expected.double()).abs()
    assert got.shape == expected.shape, message
    assert (error <= tolerance * size).all(), (message, error.max().item(), tolerance * size)


def size_of(tensor: Tensor) -> float:
    return 1 + (tensor.abs().max().item() if tensor.numel() else 0.0)


CASES = [
    *((shape, dtype) for shape in SHAPES for dtype in ALL_DTYPES),
    *((shape, dtype) for shape in LARGE_SHAPES for dtype in (torch.float32, torch.bfloat16)),
    (LARGE_SHAPES[1], torch.float64),
]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward(kernels, shape, dtype):
    for layout in layouts(shape):
        data = example(shape, dtype, layout)
        x, weight, bias = (data[name] for name in ("input", "weight", "bias"))
        exact = widened(data)
        tolerance = TOLERANCE[dtype]
        for given in ((weight, bias), (None, bias), (weight, None)):
            got = kernels.batch_norm("train", x, None, *given, layout=layout)
            if x.numel() == 0:
                assert not got["mean"].any()
                assert not got["var"].any()
                continue
            over = [0, *range(2, x.dim())]
            mean, var = exact["input"].mean(over), exact["input"].var(over, correction=0)
            scale, offset = (None if t is None else t.double() for t in given)
            y = forward(exact["input"], mean, var, scale, offset, False)
            sums = min(tolerance, TOLERANCE[torch.float32])
            check(got["mean"], mean, sums, size_of(mean), (layout, "mean"))
            check(got["var"], var, sums, size_of(var), (layout, "var"))
            check(got["output"], y, tolerance, size_of(y), (layout, "output"))
        statistics = data["mean"], data["var"]
        for relu in ("none", "after the norm"):
            got = kernels.batch_norm(
                "eval", x, None, weight, bias, *statistics, relu=relu, layout=layout
            )
            y = forward(
                *(exact[name] for name in ("input", "mean", "var", "weight", "bias")), False, relu
            )
            check(got["output"], y, tolerance, size_of(y), (layout, relu))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_backward(kernels, shape, dtype):
    for layout, training in itertools.product(layouts(shape), (True, False)):
        data = example(shape, dtype, layout)
        if data["input"].numel() == 0 and training:
            data |= {"mean": data["mean"] * 0, "var": data["var"] * 0}  # as training leaves them
        elif training:
            over = [0, *range(2, len(shape))]
            wide = data["input"].double()
            data["mean"] = wide.mean(over).to(data["mean"].dtype)
            data["var"] = wide.var(over, correction=0).to(data["var"].dtype)
        exact = widened(data)
        for relu in RELUS:
            got = kernels.batch_norm(
                f"backward of {'train' if training else 'eval'}",
                *(data[n] for n in ("input", "grad_output", "weight", "bias", "mean", "var")),
                relu=relu,
                layout=layout,
            )
            if data["input"].numel() == 0:
                assert not any(tensor.any() for tensor in got.values())
                continue
            if training and data["input"].numel() == shape[1]:
                # PyTorch refuses one value per channel. It is its own mean, whatever it is.
                check(got["output"], torch.zeros(shape), TOLERANCE[dtype], 1000, relu)
                continue
            expected = backward(exact, training, relu)
            tolerance = TOLERANCE[dtype]
            x = expected["output"]
            # Sums go with what is added up, and that with the steepness of the norm.
            steep = 1 + (exact["weight"] / (exact["var"] + 1e-5).sqrt()).max().item()
            check(got["output"], x, tolerance, 4 * steep, (layout, training, relu))
            count = x.numel() / shape[1]
            tolerance = min(tolerance, TOLERANCE[torch.float32])
            for name in ("grad_weight", "grad_bias", "grad_input_sum"):
                check(got[name], expected[name], tolerance, 3 * steep * (count**0.5 + 1),
                      (layout, training, relu, name))  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_gradient_of_a_bias(kernels, shape, dtype):
    for layout in layouts(shape):
        grad_output = example(shape, dtype, layout)["grad_output"]
        got = kernels.batch_norm("sum of a bias", None, grad_output, layout=layout)["grad_bias"]
        over = [0, *range(2, len(shape))]
        error = (got.double() - grad_output.double().sum(over)).abs()
        most = torch.finfo(got.dtype).eps * grad_output.double().abs().sum(over)
        assert (error <= most).all(), layout


@pytest.mark.parametrize(
    ("mean", "std"), [(0, 1), (3, 2), (1e4, 1e-2), (-1e3, 1), (1e-3, 1e3)], ids=str
)
@pytest.mark.parametrize("outlier", [False, True], ids=["plain", "outlier"])
def test_float32_error_is_no_larger_than_torch(kernels, mean, std, outlier):
    for shape, layout in [
        ((64, 2, 14, 14), "contiguous"),
        ((64, 2, 14, 14), "channels_last"),
        ((9, 2, 64, 60), "contiguous"),
        ((9, 2, 64, 60), "channels_last"),
        ((128, 64), "contiguous"),
        ((33, 8, 2, 2), "contiguous"),
        ((4, 3, 33, 35), "contiguous"),
    ]:
        data = example(shape, torch.float32, layout)
        random = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=random) * std + mean
        data["input"] = x.contiguous(memory_format=FORMATS[layout])
        if outlier:  # a first image unlike the others
            data["input"][0] = 0
        got = kernels.batch_norm(
            "train", data["input"], None, data["weight"], data["bias"], layout=layout
        )
        data |= {"mean": got["mean"], "var": got["var"]}
        names = ("input", "grad_output", "weight", "bias", "mean", "var")
        gradients = kernels.batch_norm(
            "backward of train", *(data[name] for name in names), layout=layout
        )
        got |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
        results = []
        for values in (widened(data), data):
            x, weight, bias = (values[name] for name in ("input", "weight", "bias"))
            statistics = torch.zeros_like(weight), torch.zeros_like(weight)
            y = F.batch_norm(x, *statistics, weight, bias, True, momentum=1)
            count = x.numel() / shape[1]
            result = {"output": y, "mean": statistics[0]}
            result["var"] = statistics[1] * ((count - 1) / count)
            gradients = backward(values, True)
            results.append(result | {f"gradient {n}": t for n, t in gradients.items()})
        exact, stock = results
        for name in got:
            if name == "gradient grad_input_sum":
                continue  # zero, but for the rounding of what is summed
            error, of_torch = (
                (result[name].double() - exact[name]).abs().max().item() for result in (got, stock)
            )
            # One rounding of a result; a mean near 0 is as good as its distance in deviations.
            size = exact[name].abs().max().item() + (std / 10 if name == "mean" else 0)
            # PyTorch's CPU kernels sum up in double.
            sums = ("var", "gradient grad_weight", "gradient grad_bias")
            roundings = 2 if name in sums else 1
            limit = 2 * of_torch + roundings * torch.finfo(torch.float32).eps * size
            assert error <= limit, (name, shape, layout, error, of_torch)


def test_same_bits_wherever_a_tensor_lies(kernels):
    for shape, layout in [((3, 8, 6, 6), "contiguous"), ((3, 8, 6, 6), "channels_last")]:
        data = example(shape, torch.float16, layout)
        results = []
        for start in (0, 1):
            moved = {}
            for name in ("input", "grad_output"):
                room = torch.zeros(data[name].numel() + 16, dtype=torch.float16)
                first = start + -room.data_ptr() // 2 % 8
                moved[name] = room[first:].as_strided(shape, data[name].stride()).copy_(data[name])
                assert moved[name].data_ptr() % 16 == 2 * start
            result = kernels.batch_norm("train", moved["input"], layout=layout)
            moved = data | moved | {"mean": result["mean"], "var": result["var"]}
            names = ("input", "grad_output", "weight", "bias", "mean", "var")
            given = [moved[name] for name in names]
            gradients = kernels.batch_norm("backward of train", *given, layout=layout)
            results.append([*result.values(), *gradients.values()])
        assert all(map(torch.equal, *results))


def everything(kernels: Kernels) -> list[Tensor]:
    """Results of every kernel, over shapes that take every way through them."""
    results = []
    for shape in [(9, 8, 7, 7), (2, 12, 8, 8), (9, 2, 64, 60), (4200, 35)]:
        for layout, dtype in itertools.product(layouts(shape), (torch.float32, torch.bfloat16)):
            data = example(shape, dtype, layout)
            names = ("input", "grad_output", "weight", "bias", "mean", "var")
            given = [data[name] for name in names]
            for what, arguments in [
                ("train", given[:1]),
                ("backward of train", given),
                ("sum of a bias", [None, given[1]]),
            ]:
                results += kernels.batch_norm(what, *arguments, layout=layout).values()
    partial = torch.arange(700 * 2 * 9).sin().view(700, 2, 9)
    return results + list(kernels.merge_moments(partial, 3, 2099))


def test_same_bits_under_every_schedule(kernels, monkeypatch):
    """The emulator runs a block's threads in another order, which its environment says."""
    expected = everything(kernels)
    for order in ("1", "7"):
        monkeypatch.setenv("CONVEXT_EMULATOR_ORDER", order)
        assert all(map(torch.equal, everything(kernels), expected)), order


def norm_of(p: Conv2dProblem, dtype: torch.dtype) -> list[Tensor]:
    """A block's norm: weight, bias, mean and var."""
    random = torch.Generator().manual_seed(p.O)
    values = [torch.rand(p.O, generator=random) for _ in range(4)]
    scaled = values[0] * 2 - 0.5, values[1] * 2 - 1, values[2] * 6, values[3] * 2 + 0.5
    return [value.to(sum_dtype(dtype)) for value in scaled]


BLOCKS = [p for p in SMALL if p.N > 0]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_block_is_its_parts(kernels, layout, dtype):
    """Same bits as convolution, ReLU and norm one after the other, where the activation is kept."""
    for p, relu, training in itertools.product(BLOCKS, RELUS[1:], (True, False)):
        data, norm = operands(p, dtype), norm_of(p, dtype)
        written = [t.clone() for t in norm]
        output, activation = kernels.conv_block(p, data, written, training, relu, layout=layout)
        expected = kernels.conv2d(p, "forward", data, "direct", layout)
        expected = F.relu(expected) if relu == "before the norm" else expected
        assert torch.equal(activation, expected), p
        if training:
            result = kernels.batch_norm("train", activation, None, *norm[:2], relu=relu,
                                        layout=layout)  # fmt: skip
            assert torch.equal(written[2], result["mean"]), p
            assert torch.equal(written[3], result["var"]), p
        else:
            result = kernels.batch_norm("eval", activation, None, *norm, relu=relu, layout=layout)
        assert torch.equal(output, result["output"]), p


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_block_equals_torch(kernels, layout, dtype):
    """In evaluation by the convolution's epilogue, in training by moments that it gathered too."""
    algorithms = ("direct", "implicit_gemm")
    algorithms += ("direct with moments",) if dtype in FLOATS else ()
    for p, relu in itertools.product(BLOCKS, RELUS[1:]):
        data, norm = operands(p, dtype), norm_of(p, dtype)
        exact = kernels.conv2d(p, "forward", operands(p), "direct", layout)
        exact = F.relu(exact) if relu == "before the norm" else exact
        tolerance = 100 * TOLERANCE[dtype]
        expected = forward(exact, *(norm[i].double() for i in (2, 3, 0, 1)), False, relu)
        got, _ = kernels.conv_block(p, data, norm, False, relu, "direct", layout, False)
        check(got, expected, tolerance, size_of(exact), (p, relu, "eval"))
        mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
        if var.min() < 1e-3:
            continue  # there the norm makes errors as large as one likes
        expected = forward(exact, mean, var, *(t.double() for t in norm[:2]), False, relu)
        for algorithm in algorithms:
            written = [t.clone() for t in norm]
            got, _ = kernels.conv_block(p, data, written, True, relu, algorithm, layout)
            of = (p, relu, algorithm)
            check(written[2], mean, tolerance, size_of(exact), of)
            check(written[3], var, tolerance, size_of(var), of)
            check(got, expected, tolerance, size_of(exact) / var.min() ** 0.5, of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_parts_are_moments_of_all(kernels, dtype):
    for rows, part_rows, channels in [
        (1, 4, 1), (8, 4, 8), (9, 4, 9), (700, 1, 7), (3000, 3, 17), (500, 600, 70),
    ]:  # fmt: skip
        x = (torch.randn(rows, channels) * 2 + 5).to(dtype)
        parts = x.split(part_rows)
        partial = torch.stack(
            [torch.stack([p.mean(0), p.var(0, correction=0) * len(p)]) for p in parts]
        )
        mean, deviation = (
            result.double() for result in kernels.merge_moments(partial, part_rows, rows)
        )
        expected = x.double().mean(0), x.double().var(0, correction=0) * rows
        # The parts' means are rounded too.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mean, expected[0], rtol=4 * eps, atol=0)
        torch.testing.assert_close(deviation, expected[1], rtol=32 * eps, atol=64 * eps)
