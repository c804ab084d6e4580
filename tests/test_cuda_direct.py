"""What tells "direct" on CUDA from other algorithms, by the emulator: its kernels for large
problems, indices of 64 bits, and the error of its sums.
"""

import numpy as np
import pytest
import torch
from emulated_cuda import FORMATS, Epilogue
from problems import Conv2dProblem, named
from reference import FLOATS, HALVES, PASSES, Expected, Operands, expect, operands, torch_pass

P = Conv2dProblem


# --------------------------------------------------------------------------------------------------
# Tiles that only many results, or few channels, ask for

LARGE = [
    P("tiles of 4 channels", 2, 2, 262, 261, 3, (2, 1), (1, 1), (0, 1)),
    P("tiles of 8 channels", 2, 2, 262, 261, 6, (1, 2), (1, 1), (1, 0)),
    P("tiles of 8 channels, two groups", 1, 10, 262, 265, 20, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    P("to 5 channels, strided", 1, 5, 370, 369, 2, (2, 3), (2, 1), (0, 1)),
    P("3x3 stem of 3 channels", 1, 3, 33, 35, 68, (3, 3), (1, 1), (1, 1)),
    P("7x7 stem of 3 channels", 2, 3, 45, 69, 33, (7, 7), (2, 2), (3, 3)),
    P("stem, dilated", 1, 4, 30, 43, 9, (3, 5), (1, 3), (2, 1), (3, 2)),
    P("stem, stride 3 of dilation 4", 1, 2, 51, 60, 12, (5, 4), (2, 3), (1, 0), (1, 4)),
    P("5x5 of one channel", 3, 1, 28, 29, 8, (5, 5), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_large(kernels, problem, conv_pass, dtype, layout):
    data = operands(problem, dtype)
    result = kernels.conv2d(problem, conv_pass, data, "direct", layout)
    expect(problem, conv_pass, data).check(result)


# --------------------------------------------------------------------------------------------------
# Epilogues


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("relus", [(True, False), (False, True)], ids=["relu first", "relu last"])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "map"])
@pytest.mark.parametrize("problem", [named("no input channels"), *LARGE[4:6]], ids=str)
def test_epilogue(kernels, problem, mapped, relus, dtype, layout):
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, problem.O, generator=generator).to(accumulated) if mapped else [None] * 3
    epilogue = Epilogue(relus[0], *maps, relus[1])
    data = operands(problem, dtype)
    result = kernels.conv2d(problem, "forward", data, "direct", layout, epilogue=epilogue)
    plain = expect(problem, "forward", data)
    wanted, slope, size = epilogue(plain.result), 1, 0
    if mapped:
        shift, scale, offset = (t.double().abs()[:, None, None] for t in maps)
        slope, size = scale, (plain.result.abs() + shift) * scale + offset
    tolerance = plain.tolerance * slope + torch.finfo(dtype).eps * (wanted.abs() + size)
    Expected(wanted, tolerance).check(result)


# --------------------------------------------------------------------------------------------------
# 64-bit indices: tensors of more than 2^31 elements, of which a strided or padded kernel meets few


def untouched(*size: int) -> torch.Tensor:
    """Zeros for which no memory is found before they are written."""
    return torch.from_numpy(np.zeros(size, np.float16))


def values(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(torch.float16)


@pytest.mark.parametrize("conv_pass", ["forward", "grad_weight"])
def test_input_of_more_than_31_bits(kernels, conv_pass):
    p = P("far pixels", 1, 1, 65537, 32769, 1, (1, 1), (32768, 16384))
    input, met = untouched(*p.input_size), values(1, 1, 3, 3)
    assert input.numel() > 2**31
    input[:, :, :: p.stride[0], :: p.stride[1]] = met
    data = Operands(input, values(1, 1, 1, 1), values(1), values(*p.output_size))
    result = kernels.conv2d(p, conv_pass, data, "direct")
    small = P("near pixels", 1, 1, 3, 3, 1, (1, 1))
    expect(small, conv_pass, data._replace(input=met)).check(result)


def test_grad_output_of_more_than_31_bits(kernels):
    """Most of it stands for padding."""
    p = P("much padding", 1, 1, 2, 1, 8, (1, 1), (1, 1), (8192, 10000))
    grad_output, met = untouched(*p.output_size), values(1, 8, 2, 1)
    row, column = p.padding
    grad_output[:, :, row : row + 2, column : column + 1] = met
    assert grad_output[0, :-1].numel() > 2**31
    data = Operands(values(1, 1, 2, 1), values(8, 1, 1, 1), values(8), grad_output)
    result = kernels.conv2d(p, "grad_input", data, "direct")
    small = P("no padding", 1, 1, 2, 1, 8, (1, 1))
    expect(small, "grad_input", data._replace(grad_output=met)).check(result)


# --------------------------------------------------------------------------------------------------
# Accuracy

# Of lengths around those of chains and chunks; the first two were off by too much when chains had
# 128 products.
SUMS = [
    named(name)
    for name in (
        "3x3, 6x9 pixels, 15 to 16",
        "3x3, 17x14 pixels, 5 to 9",
        "257 taps",
        "1040 taps, above 1024",
        "large kernel",
    )
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("problem", SUMS, ids=str)
def test_float32_error_beside_torchs(kernels, problem, conv_pass, layout):
    """As test_conv2d.py's, which says why the mean over draws and what the floor is for."""
    ours = stock = floor = 0.0
    draws = 16
    for seed in range(draws):
        data = operands(problem, torch.float32, seed)
        exact = torch_pass(problem, conv_pass, data.to(torch.float64))
        result = kernels.conv2d(problem, conv_pass, data, "direct", layout)
        ours += (result.double() - exact).abs().max().item() / draws
        result = torch_pass(problem, conv_pass, data)
        stock += (result.double() - exact).abs().max().item() / draws
        floor += torch.finfo(torch.float32).eps / 2 * exact.abs().max().item() / draws
    assert ours <= 2 * max(stock, floor), f"our error {ours:.3g}, torch's {stock:.3g}"
