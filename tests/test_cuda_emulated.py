"""The CUDA kernels, by the emulator, on the CPU kernels' problems.

The ordinary suite runs a selection of the calls: each problem in every pass, in one dtype and
layout after the other. `pytest --emulate-all` runs them all.
"""

import itertools

import numpy as np
import pytest
import torch
from emulated_cuda import FORMATS, Epilogue, Kernels
from problems import PROBLEMS, Conv2dProblem, named
from reference import (
    FLOATS,
    HALVES,
    PASSES,
    Operands,
    declines,
    expect,
    expected,
    operands,
    torch_pass,
)

P = Conv2dProblem
ALGORITHMS = ("direct", "depthwise", "im2col", "implicit_gemm")
CALLS = list(itertools.product([*FLOATS, *HALVES], FORMATS))

PRODUCTS = [
    "all settings differ",
    "16 to 17 channels",
    "3x3 in groups",
    "rows split, strided",
    "297 taps",
    "panels of rows, strided",
]
# Of each algorithm, what its kernels do in more than one way: sums in parts, tiles cut off.
PARTS = {
    "direct": [
        "all settings differ",
        "rows split, strided",
        "stem of 3 channels",
        "256 taps",
        "several images in a block",
    ],
    "im2col": PRODUCTS,
    "implicit_gemm": PRODUCTS,
    "depthwise": [
        "depthwise multiplier",
        "depthwise, 8 wide, 16 channels",
        "depthwise, 5x5, strided, even",
        "depthwise, 5x5, tiles, multiplier 2",
        "depthwise, dilated, strided",
        "depthwise, many images",
        "depthwise, rows split, strided",
    ],
}


def cases(whole: bool):
    """(problem, pass, dtype, layout, algorithm), and how it is called."""
    for (i, problem), (j, conv_pass), (k, algorithm) in itertools.product(
        enumerate(PROBLEMS), enumerate(PASSES), enumerate(ALGORITHMS)
    ):
        if declines(algorithm, problem):
            continue
        for dtype, layout in CALLS if whole else [CALLS[(i + 3 * j + k) % len(CALLS)]]:
            case = problem, conv_pass, dtype, layout, algorithm
            yield pytest.param(case, id="-".join(str(part) for part in case))


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("--emulate-all")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(cases(whole)))
    if "part" in metafunc.fixturenames:
        metafunc.parametrize(
            ("part", "cuda_algorithm"),
            [
                (problem, algorithm)
                for algorithm in ALGORITHMS
                for problem in (PROBLEMS if whole else map(named, PARTS[algorithm]))
                if not declines(algorithm, problem)
            ],
            ids=str,
        )


def test_equals_torch(kernels, case):
    problem, conv_pass, dtype, layout, algorithm = case
    data = operands(problem, dtype)
    result = kernels.conv2d(problem, conv_pass, data, algorithm, layout)
    assert not isinstance(result, str), result
    expected(problem, conv_pass, dtype, algorithm).check(result)


def test_every_algorithm_is_tested(kernels):
    assert set(kernels.algorithms()) == set(ALGORITHMS)


@pytest.mark.parametrize("cuda_algorithm", ALGORITHMS)
def test_declines_what_it_does_not_do(kernels, cuda_algorithm):
    """In words; where nothing is to be computed, nobody is asked."""
    for problem, conv_pass in itertools.product(PROBLEMS, PASSES):
        if declines(cuda_algorithm, problem):
            data = operands(problem, torch.float32)
            result = kernels.conv2d(problem, conv_pass, data, cuda_algorithm)
            assert isinstance(result, str) or result.numel() == 0


# --------------------------------------------------------------------------------------------------
# Accuracy


def rounded_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """To the nearest of 11 significant bits, ties away from zero, as cvt.rna.tf32.f32 does."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def error_beside_torchs(kernels, part, conv_pass, dtype, layout, algorithm, draws, tf32=False):
    """The largest error against float64, ours and that of PyTorch in the same precision on the CPU,
    which for TF32 is float32 of rounded operands; means over draws.

    A result rounded to the nearest is off by half a unit in its last place, which is the least that
    PyTorch's is taken to be.
    """
    ours = stock = floor = 0.0
    for seed in range(draws):
        data = operands(part, dtype, seed)
        exact = torch_pass(part, conv_pass, data.to(torch.float64))
        if exact.numel() == 0:
            break
        result = kernels.conv2d(part, conv_pass, data, algorithm, layout, tf32=tf32)
        ours += (result.double() - exact).abs().max().item() / draws
        if tf32:
            data = Operands(*map(rounded_to_tf32, data))._replace(bias=data.bias)
        stock += (torch_pass(part, conv_pass, data).double() - exact).abs().max().item() / draws
        floor += torch.finfo(dtype).eps / 2 * exact.abs().max().item() / draws
    return ours, max(stock, floor)


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("layout", FORMATS)
def test_float32_error_beside_torchs(
    kernels, part, conv_pass, layout, cuda_algorithm, pytestconfig
):
    draws = 16 if pytestconfig.getoption("--emulate-all") else 4
    ours, stock = error_beside_torchs(
        kernels, part, conv_pass, torch.float32, layout, cuda_algorithm, draws
    )
    assert ours <= 2 * stock


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_error_beside_torchs(kernels, part, conv_pass, dtype, cuda_algorithm):
    ours, stock = error_beside_torchs(
        kernels, part, conv_pass, dtype, "channels_last", cuda_algorithm, draws=2
    )
    assert ours <= 2 * stock


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("cuda_algorithm", ["im2col", "implicit_gemm"])
def test_tf32_error_beside_a_reference(kernels, conv_pass, cuda_algorithm):
    for problem in [*map(named, PRODUCTS), CHANNELS_IN_VECTORS]:
        ours, stock = error_beside_torchs(
            kernels,
            problem,
            conv_pass,
            torch.float32,
            "channels_last",
            cuda_algorithm,
            2,
            tf32=True,
        )
        assert ours <= 2 * stock, problem


LONG = {
    "direct": P("long sums", 30, 8, 40, 41, 9, (3, 3), (1, 1), (1, 1)),
    "depthwise": P("long sums", 70, 64, 40, 41, 64, (3, 3), (1, 1), (1, 1), (1, 1), 64),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("cuda_algorithm", ALGORITHMS)
def test_float32_error_of_long_sums(kernels, layout, cuda_algorithm):
    """Of a gradient of the weight, over 49,200 pixels or more, all of one sign."""
    problem = LONG.get(cuda_algorithm, LONG["direct"])
    data = operands(problem, torch.float32).abs()
    exact = torch_pass(problem, "grad_weight", data.to(torch.float64))
    result = kernels.conv2d(problem, "grad_weight", data, cuda_algorithm, layout)
    error = ((result.double() - exact) / exact).abs().max().item()
    # 1 to 4 of them here, 80 to 160 in PyTorch.
    assert error <= 8 * torch.finfo(torch.float32).eps, error


# --------------------------------------------------------------------------------------------------
# The same bits


def everything(kernels: Kernels, algorithm: str) -> list[torch.Tensor]:
    """What an algorithm computes of its parts."""
    results = []
    for name, conv_pass, layout in itertools.product(PARTS[algorithm], PASSES, FORMATS):
        data = operands(named(name), torch.float32)
        results.append(kernels.conv2d(named(name), conv_pass, data, algorithm, layout))
    return results


@pytest.fixture(scope="module")
def usual(kernels):
    return {name: everything(kernels, name) for name in ALGORITHMS}


@pytest.mark.parametrize("cuda_algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("order", "copies", "threads"), [(0, "late", 1), (1, "early", 2), (7, "late", 3)]
)
def test_same_bits_under_every_schedule(
    kernels, usual, order, copies, threads, cuda_algorithm, monkeypatch
):
    monkeypatch.setenv("CONVEXT_EMULATOR_ORDER", str(order))
    monkeypatch.setenv("CONVEXT_EMULATOR_ASYNC", copies)
    monkeypatch.setenv("CONVEXT_EMULATOR_THREADS", str(threads))
    assert all(map(torch.equal, everything(kernels, cuda_algorithm), usual[cuda_algorithm]))


def _unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, whose first element lies at no vector's boundary."""
    storage = tensor.new_full([tensor.numel() + 3], float("nan"))
    return storage[3:].as_strided(tensor.shape, tensor.stride(), 3).copy_(tensor)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("conv_pass", PASSES)
def test_same_bits_wherever_operands_begin(kernels, part, conv_pass, dtype, layout, cuda_algorithm):
    data = Operands(
        *(
            t.contiguous(memory_format=FORMATS[layout]) if t.dim() == 4 else t
            for t in operands(part, dtype)
        )
    )
    moved = Operands(*map(_unaligned, data))
    results = [kernels.conv2d(part, conv_pass, d, cuda_algorithm, layout) for d in (data, moved)]
    assert torch.equal(*results)


# --------------------------------------------------------------------------------------------------
# What a matrix product runs on

PRODUCT_ALGORITHMS = ("im2col", "implicit_gemm")
CHANNELS_IN_VECTORS = P("channels in vectors", 2, 16, 5, 7, 24, (3, 3), (2, 1), (1, 1))
# 128 tiles, or little more, of 128 x 128.
LARGE_TILES = [
    (P("large tiles", 1, 4, 128, 130, 120, (1, 2)), "forward"),
    (P("large tiles of a weight", 1, 229, 3, 3, 1020, (3, 3), (1, 1), (1, 1)), "grad_weight"),
    (P("large tiles of an input", 1, 120, 128, 130, 8, (1, 1)), "grad_input"),
]


def _tf32(p: Conv2dProblem, conv_pass: str, data: Operands):
    """Both factors are rounded to 11 significant bits: each product may be off by 2^-11 twice."""
    exact = expect(p, conv_pass, data)
    products = torch_pass(p, conv_pass, data.to(torch.float64).abs())
    return exact._replace(tolerance=exact.tolerance + 2 * 2**-11 * products)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("cuda_algorithm", PRODUCT_ALGORITHMS)
def test_tf32_where_allowed(kernels, conv_pass, layout, cuda_algorithm):
    for problem in [*map(named, PRODUCTS), CHANNELS_IN_VECTORS]:
        data = operands(problem, torch.float32)
        result = kernels.conv2d(problem, conv_pass, data, cuda_algorithm, layout, tf32=True)
        _tf32(problem, conv_pass, data).check(result)
    # The last one's channels are for tensor cores, and they round.
    with pytest.raises(AssertionError):
        expect(problem, conv_pass, data).check(result)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("cuda_algorithm", PRODUCT_ALGORITHMS)
def test_without_tensor_cores(kernels, conv_pass, layout, dtype, cuda_algorithm):
    for problem in [*map(named, PRODUCTS[:3]), CHANNELS_IN_VECTORS]:
        data = operands(problem, dtype)
        result = kernels.conv2d(
            problem, conv_pass, data, cuda_algorithm, layout, tf32=True, compute_capability=75
        )
        expect(problem, conv_pass, data).check(result)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "contiguous"), (torch.float16, "channels_last")], ids=str
)
@pytest.mark.parametrize("cuda_algorithm", PRODUCT_ALGORITHMS)
def test_large_tiles(kernels, layout, dtype, cuda_algorithm):
    for problem, conv_pass in LARGE_TILES:
        data = operands(problem, dtype)
        result = kernels.conv2d(problem, conv_pass, data, cuda_algorithm, layout)
        expected(problem, conv_pass, dtype).check(result)


# --------------------------------------------------------------------------------------------------
# The epilogue


@pytest.mark.parametrize("steps", ["bias relu", "map", "relu map", "bias map relu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("cuda_algorithm", ALGORITHMS)
def test_epilogue(kernels, dtype, layout, steps, cuda_algorithm):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name in PARTS[cuda_algorithm][:3]:
        problem = named(name)
        data = operands(problem, dtype)
        none = torch.zeros_like(data.bias)
        before = expect(problem, "forward", data if "bias" in steps else data._replace(bias=none))
        shift, scale, offset = torch.randn(3, problem.O, dtype=sums).unbind()
        maps = {"shift": shift, "scale": scale, "offset": offset} if "map" in steps else {}
        epilogue = Epilogue(
            relu_before="relu" in steps.split("map")[0], **maps, relu_after="map relu" in steps
        )
        if "bias" not in steps:
            data = data._replace(bias=None)
        result = kernels.conv2d(problem, "forward", data, cuda_algorithm, layout, epilogue=epilogue)
        exact = epilogue(before.result)
        largest = max(scale.abs().max().item(), 1) if maps else 1
        of_map = 4 * torch.finfo(sums).eps * (before.result.abs() + 9) * largest
        tolerance = before.tolerance * largest + of_map + torch.finfo(dtype).eps * exact.abs()
        before._replace(result=exact, tolerance=tolerance).check(result)


# --------------------------------------------------------------------------------------------------
# Offsets of more than 31 bits, in memory of which few pages are touched


def _huge(size: tuple[int, ...], layout: str) -> torch.Tensor:
    """Zeros for which no memory is found before they are written."""
    _, c, h, w = size
    flat = torch.from_numpy(np.zeros(c * h * w, np.float16))
    strides = (h * w, w, 1) if layout == "contiguous" else (1, w * c, c)
    return flat.as_strided(size, (c * h * w, *strides))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("conv_pass", PASSES)
def test_offsets_above_31_bits_in_depthwise(kernels, conv_pass, layout):
    """Of the corners of a map of 2 x 47,000 x 47,000, where taps meet it that are far apart; of its
    middle, as the gradient of one pixel in the midst of padding.
    """
    size = 47000
    name, at = ("grad_output", [size // 2]) if conv_pass == "grad_input" else ("input", [0, -1])
    if name == "input":
        p = P("", 1, 2, size, size, 2, (1, 1), (size - 1, size - 1), groups=2)
    else:
        p = P("", 1, 2, 1, 1, 2, (1, 1), (1, 1), (size // 2, size // 2), groups=2)
    small = P("", 1, 2, len(at), len(at), 2, (1, 1), groups=2)
    data = operands(small, torch.float16)
    values = getattr(data, name)
    huge = _huge(p.input_size if name == "input" else p.output_size, layout)
    assert huge.numel() // 2 > 1 << 31
    huge[:, :, torch.tensor(at)[:, None], torch.tensor(at)] = values
    result = kernels.conv2d(p, conv_pass, data._replace(**{name: huge}), "depthwise", layout)
    assert not isinstance(result, str), result
    expect(small, conv_pass, data).check(result)
