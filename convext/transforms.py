"""The convolutions under torch.func's transforms and under forward-mode differentiation.

The ops carry C++ autograd Functions, which are quick and know neither. Here the same kernels stand
behind Python Functions that do: `setup_context` for grad and its kin, `vmap`, and `jvp`. All three
verbs are bilinear, so that each derivative, tangent and batch is made of the three again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ops = torch.ops.convext


def active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way."""
    # Private names of torch, used nowhere else; tests/test_transforms.py fails where they change.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    algorithm: str,
) -> Tensor:
    """The op conv2d; same arguments."""
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups, algorithm)
    output = Conv2d.apply(input, weight, settings)
    return output if bias is None else output + bias.reshape(1, -1, 1, 1)


def _kernel(op, first: Tensor, second: Tensor, *arguments) -> Tensor:
    """Calls an op below its own autograd, which is this module's here.

    torch.compile can't trace the guard: a transform inside a compiled function is a graph break, or
    an error with fullgraph=True. Ops without autograd in its place would compile, and give zeros
    for gradients.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return op(first, second, *arguments)


def _with_groups(settings: tuple, factor: int) -> tuple:
    return (*settings[:3], settings[3] * factor, settings[4])


def _front(tensor: Tensor, batch_dim: int | None, batch_size: int) -> Tensor:
    """The batched axis in front, made where there is none."""
    if batch_dim is None:
        return tensor.expand(batch_size, *tensor.shape)
    return tensor.movedim(batch_dim, 0)


def _into_batch(tensor: Tensor) -> Tensor:
    """(B, N, C, H, W) to (B * N, C, H, W)."""
    return tensor.flatten(0, 1)


def _into_channels(tensor: Tensor) -> Tensor:
    """(B, N, C, H, W) to (N, B * C, H, W): every member of the batch a group of its own."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _from_channels(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.unflatten(1, (batch_size, -1)).transpose(0, 1)


class _Bilinear(torch.autograd.Function):
    """What the three verbs share. Arguments: two tensors, (a size,) and the settings."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, *ctx.rest = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def tangent(cls, ctx, first_tangent, second_tangent):
        first, second = ctx.saved_tensors
        terms = []
        if first_tangent is not None:
            terms.append(cls.apply(first_tangent, second, *ctx.rest))
        if second_tangent is not None:
            terms.append(cls.apply(first, second_tangent, *ctx.rest))
        return sum(terms[1:], terms[0]) if terms else None


class Conv2d(_Bilinear):
    """(input, weight, settings) to output."""

    @staticmethod
    def forward(input, weight, settings):
        return _kernel(_ops.conv2d, input, weight, None, *settings)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        (settings,) = ctx.rest
        needs = ctx.needs_input_grad
        return (
            Conv2dBackwardInput.apply(grad, weight, input.shape, settings) if needs[0] else None,
            Conv2dBackwardWeight.apply(grad, input, weight.shape, settings) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, _):
        return Conv2d.tangent(ctx, input_tangent, weight_tangent)

    @staticmethod
    def vmap(info, in_dims, input, weight, settings):
        batch = info.batch_size
        input = _front(input, in_dims[0], batch)
        if in_dims[1] is None:
            output = Conv2d.apply(_into_batch(input), weight, settings)
            return output.unflatten(0, (batch, -1)), 0
        weight = weight.movedim(in_dims[1], 0).flatten(0, 1)
        output = Conv2d.apply(_into_channels(input), weight, _with_groups(settings, batch))
        return _from_channels(output, batch), 0


class Conv2dBackwardInput(_Bilinear):
    """(grad_output, weight, input_size, settings) to grad_input."""

    @staticmethod
    def forward(grad_output, weight, size, settings):
        return _kernel(_ops.conv2d_backward_input, grad_output, weight, size, *settings)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        _, settings = ctx.rest
        needs = ctx.needs_input_grad
        return (
            Conv2d.apply(grad, weight, settings) if needs[0] else None,
            Conv2dBackwardWeight.apply(grad_output, grad, weight.shape, settings)
            if needs[1]
            else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_tangent, weight_tangent, *_):
        return Conv2dBackwardInput.tangent(ctx, grad_tangent, weight_tangent)

    @staticmethod
    def vmap(info, in_dims, grad_output, weight, size, settings):
        batch = info.batch_size
        grad_output = _front(grad_output, in_dims[0], batch)
        if in_dims[1] is None:
            size = (batch * size[0], *size[1:])
            result = Conv2dBackwardInput.apply(_into_batch(grad_output), weight, size, settings)
            return result.unflatten(0, (batch, -1)), 0
        weight = weight.movedim(in_dims[1], 0).flatten(0, 1)
        size = (size[0], batch * size[1], *size[2:])
        result = Conv2dBackwardInput.apply(
            _into_channels(grad_output), weight, size, _with_groups(settings, batch)
        )
        return _from_channels(result, batch), 0


class Conv2dBackwardWeight(_Bilinear):
    """(grad_output, input, weight_size, settings) to grad_weight."""

    @staticmethod
    def forward(grad_output, input, size, settings):
        return _kernel(_ops.conv2d_backward_weight, grad_output, input, size, *settings)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        _, settings = ctx.rest
        needs = ctx.needs_input_grad
        return (
            Conv2d.apply(input, grad, settings) if needs[0] else None,
            Conv2dBackwardInput.apply(grad_output, grad, input.shape, settings)
            if needs[1]
            else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, *_):
        return Conv2dBackwardWeight.tangent(ctx, grad_tangent, input_tangent)

    @staticmethod
    def vmap(info, in_dims, grad_output, input, size, settings):
        batch = info.batch_size
        grad_output = _front(grad_output, in_dims[0], batch)
        input = _front(input, in_dims[1], batch)
        size = (batch * size[0], *size[1:])
        result = Conv2dBackwardWeight.apply(
            _into_channels(grad_output), _into_channels(input), size, _with_groups(settings, batch)
        )
        return result.unflatten(0, (batch, -1)), 0
