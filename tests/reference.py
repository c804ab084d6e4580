"""Oracles for the convolution: its definition as plain loops in float64, the explicit matrix, and
PyTorch in float64 with a bound on the rounding error of a result in a smaller dtype.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from problems import Conv2dProblem
from torch import Tensor

PASSES = ("forward", "grad_input", "grad_weight")
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64)

# --------------------------------------------------------------------------------------------------
# What an algorithm is for


def declines(algorithm: str, p: Conv2dProblem) -> bool:
    """Whether an algorithm refuses a problem, in every pass: what its documentation says, written
    apart from its code.
    """
    if algorithm == "depthwise":
        return p.groups != p.C
    if algorithm in ("winograd", "winograd_2x2"):
        three_by_three = p.kernel == (3, 3) and p.stride == p.dilation == (1, 1)
        return not three_by_three or max(p.padding) > 2
    return False


# Winograd's transforms add and subtract the pixels of a tile, so an error goes with the largest
# results and not with the one that it is in. Every result may be off by so many times the most that
# other algorithms may be; measured over all problems: 0.9 and 0.3.
WINOGRAD_TOLERANCE = {"winograd": 2.0, "winograd_2x2": 1.0}
# And so many times PyTorch's own largest error in float32; measured: 7.4 and 2.4.
WINOGRAD_ERROR = {"winograd": 12.0, "winograd_2x2": 4.0}

# --------------------------------------------------------------------------------------------------
# The definition


class Product(NamedTuple):
    """One multiplication: indices into output, input and weight."""

    output: tuple[int, int, int, int]
    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]


def products(p: Conv2dProblem) -> Iterator[Product]:
    """Every multiplication of a convolution; those with padding, being zero, are left out."""
    filters, channels = p.O // p.groups, p.C // p.groups
    _, _, out_height, out_width = p.output_size
    for n, o, y, x in np.ndindex(p.N, p.O, out_height, out_width):
        for c, ky, kx in np.ndindex(channels, *p.kernel):
            row = y * p.stride[0] - p.padding[0] + ky * p.dilation[0]
            column = x * p.stride[1] - p.padding[1] + kx * p.dilation[1]
            if 0 <= row < p.H and 0 <= column < p.W:
                channel = o // filters * channels + c
                yield Product((n, o, y, x), (n, channel, row, column), (o, c, ky, kx))


def plain_forward(p: Conv2dProblem, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """output[n, o, y, x] = bias[o] + sum of input * weight."""
    x, w = input.double().numpy(), weight.double().numpy()
    output = np.zeros(p.output_size) + bias.double().numpy()[:, None, None]
    for i in products(p):
        output[i.output] += x[i.input] * w[i.weight]
    return torch.from_numpy(output)


def plain_grad_input(p: Conv2dProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
    """Derivative of sum(output * grad_output) with respect to input."""
    g, w = grad_output.double().numpy(), weight.double().numpy()
    grad = np.zeros(p.input_size)
    for i in products(p):
        grad[i.input] += g[i.output] * w[i.weight]
    return torch.from_numpy(grad)


def plain_grad_weight(p: Conv2dProblem, grad_output: Tensor, input: Tensor) -> Tensor:
    """Derivative of sum(output * grad_output) with respect to weight."""
    g, x = grad_output.double().numpy(), input.double().numpy()
    grad = np.zeros(p.weight_size)
    for i in products(p):
        grad[i.weight] += g[i.output] * x[i.input]
    return torch.from_numpy(grad)


def plain_grad_bias(grad_output: Tensor) -> Tensor:
    """Derivative of sum(output * grad_output) with respect to bias."""
    grad = np.zeros(grad_output.shape[1])
    for (_, o, _, _), g in np.ndenumerate(grad_output.double().numpy()):
        grad[o] += g
    return torch.from_numpy(grad)


def conv_matrix(p: Conv2dProblem, weight: Tensor) -> Tensor:
    """The matrix that a convolution is: output.flatten() = matrix @ input.flatten(), without bias.

    Of shape (N * O * out_H * out_W, N * C * H * W), float64. Its transpose takes grad_output to
    grad_input.
    """
    w = weight.double().numpy()
    matrix = np.zeros((np.prod(p.output_size), np.prod(p.input_size)))
    for i in products(p):
        row = np.ravel_multi_index(i.output, p.output_size)
        matrix[row, np.ravel_multi_index(i.input, p.input_size)] += w[i.weight]
    return torch.from_numpy(matrix)


# --------------------------------------------------------------------------------------------------
# PyTorch in float64


class Operands(NamedTuple):
    """Tensors of a problem."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    def to(self, dtype: torch.dtype) -> "Operands":
        return Operands(*(tensor.to(dtype) for tensor in self))

    def abs(self) -> "Operands":
        return Operands(*(tensor.abs() for tensor in self))


@lru_cache(maxsize=1024)
def operands(p: Conv2dProblem, dtype: torch.dtype = torch.float64, seed: int = 0) -> Operands:
    """Random tensors for a problem: the same on every call, and up to rounding for every dtype."""
    generator = torch.Generator().manual_seed(crc32(p.name.encode()) + seed)
    sizes = p.input_size, p.weight_size, (p.O,), p.output_size
    return Operands(*(torch.randn(size, generator=generator) for size in sizes)).to(dtype)


def torch_pass(p: Conv2dProblem, conv_pass: str, data: Operands) -> Tensor:
    """PyTorch's own result, in the dtype of the data; the forward pass with bias.

    Of no input channels it makes no output channels, whatever the weight's size: there, the
    definition.
    """
    if conv_pass == "forward" and p.C == 0:
        return data.bias[:, None, None].expand(p.output_size)
    if conv_pass == "forward":
        return torch.nn.functional.conv2d(data.input, data.weight, data.bias, *p.settings)
    stride, padding, dilation, groups = p.settings
    grads = torch.ops.aten.convolution_backward(
        data.grad_output, data.input, data.weight, None, stride, padding, dilation, False, [0, 0],
        groups, [conv_pass == "grad_input", conv_pass == "grad_weight", False],
    )  # fmt: skip
    return grads[PASSES.index(conv_pass) - 1]


def convext_pass(
    p: Conv2dProblem, conv_pass: str, data: Operands, algorithm: str = "auto"
) -> Tensor:
    """Our result, by the op itself; the forward pass with bias."""
    ops = torch.ops.convext
    if conv_pass == "forward":
        return ops.conv2d(data.input, data.weight, data.bias, *p.settings, algorithm)
    if conv_pass == "grad_input":
        return ops.conv2d_backward_input(
            data.grad_output, data.weight, p.input_size, *p.settings, algorithm
        )
    return ops.conv2d_backward_weight(
        data.grad_output, data.input, p.weight_size, *p.settings, algorithm
    )


class Expected(NamedTuple):
    """A result in float64, and how far from it a result in another dtype may lie."""

    result: Tensor
    tolerance: Tensor

    def check(self, result: Tensor) -> None:
        assert result.shape == self.result.shape
        error = (result.detach().cpu().double() - self.result).abs()
        bad = ~(error <= self.tolerance)  # also where it is NaN
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(bad.sum())} of {bad.numel()} elements are wrong; the first, at {at}, is "
                f"{result[at].item()!r}, expected {self.result[at].item()!r}, error "
                f"{error[at].item():.3g}, allowed {self.tolerance[at].item():.3g}"
            )


def expect(p: Conv2dProblem, conv_pass: str, data: Operands, algorithm: str = "direct") -> Expected:
    """What a pass over this data must give, data being of the dtype in which it is given to us.

    A sum of K products, each step rounded with unit roundoff u, is off by at most
    K * u * sum(|a * b|), and with random roundings almost surely by less than
    4 * sqrt(K) * u * sum(|a * b|) (Higham and Mary, "A New Approach to Probabilistic Rounding Error
    Analysis", 2019). Sums of 16-bit types are accumulated in float32, and their result is rounded
    once, to the nearest. Float64 is compared with PyTorch's float64, whose roundings count as well.
    """
    dtype = data.input.dtype
    # Contiguous, for PyTorch's own float64 goes wrong on some strides (grad_weight of a grad_output
    # one pixel wide whose rows have gaps, torch 2.13).
    exact = Operands(*(tensor.to(torch.float64).contiguous() for tensor in data))
    result = torch_pass(p, conv_pass, exact)
    sums = torch_pass(p, conv_pass, exact.abs())
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    roundoff = torch.finfo(accumulated).eps / 2
    tolerance = 4 * (p.terms(conv_pass) + 1) ** 0.5 * roundoff * sums
    if dtype == torch.float64:
        tolerance *= 2
    if algorithm in WINOGRAD_TOLERANCE and tolerance.numel():
        tolerance = (WINOGRAD_TOLERANCE[algorithm] * tolerance.max()).expand_as(tolerance)
    if dtype in HALVES:
        finfo = torch.finfo(dtype)
        rounding = finfo.eps / 2 * (result.abs() + tolerance) + finfo.smallest_normal * finfo.eps
        tolerance = tolerance + rounding
    return Expected(result, tolerance)


@lru_cache(maxsize=2048)
def expected(
    p: Conv2dProblem, conv_pass: str, dtype: torch.dtype, algorithm: str = "direct"
) -> Expected:
    """What a pass over `operands(p, dtype)` must give."""
    return expect(p, conv_pass, operands(p, dtype), algorithm)
