"""The convolutions behind Python autograd Functions.

All three verbs are bilinear, so that each derivative, tangent and batch is made of the three again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convext.transforms.common import (
    Function,
    below_autograd,
    from_channels,
    in_graph,
    into_batch,
    into_channels,
    to_front,
)

_ops = torch.ops.convext


@in_graph
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
    # The op's own autocast comes too late for autograd above it.
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = (_cast(tensor, dtype) for tensor in (input, weight, bias))
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups, algorithm)
    output = Conv2d.apply(input, weight, settings)
    return output if bias is None else output + bias.reshape(1, -1, 1, 1)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """To autocast's dtype, but for what autocast leaves alone."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _with_groups(settings: tuple, factor: int) -> tuple:
    return (*settings[:3], settings[3] * factor, settings[4])


class _Bilinear(Function):
    """What the three verbs share. Arguments: two tensors, (a size,) and the settings."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, *ctx.rest = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def tangent(cls, ctx, saved, first_tangent, second_tangent, *_):
        first, second = saved
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
        return below_autograd(_ops.conv2d, input, weight, None, *settings)

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
    def vmap(info, in_dims, input, weight, settings):
        batch = info.batch_size
        input = to_front(input, in_dims[0], batch)
        if in_dims[1] is None:
            output = Conv2d.apply(into_batch(input), weight, settings)
            return output.unflatten(0, (batch, -1)), 0
        weight = weight.movedim(in_dims[1], 0).flatten(0, 1)
        output = Conv2d.apply(into_channels(input), weight, _with_groups(settings, batch))
        return from_channels(output, batch), 0


class Conv2dBackwardInput(_Bilinear):
    """(grad_output, weight, input_size, settings) to grad_input."""

    @staticmethod
    def forward(grad_output, weight, size, settings):
        return below_autograd(_ops.conv2d_backward_input, grad_output, weight, size, *settings)

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
    def vmap(info, in_dims, grad_output, weight, size, settings):
        batch = info.batch_size
        grad_output = to_front(grad_output, in_dims[0], batch)
        if in_dims[1] is None:
            size = (batch * size[0], *size[1:])
            result = Conv2dBackwardInput.apply(into_batch(grad_output), weight, size, settings)
            return result.unflatten(0, (batch, -1)), 0
        weight = weight.movedim(in_dims[1], 0).flatten(0, 1)
        size = (size[0], batch * size[1], *size[2:])
        result = Conv2dBackwardInput.apply(
            into_channels(grad_output), weight, size, _with_groups(settings, batch)
        )
        return from_channels(result, batch), 0


class Conv2dBackwardWeight(_Bilinear):
    """(grad_output, input, weight_size, settings) to grad_weight."""

    @staticmethod
    def forward(grad_output, input, size, settings):
        return below_autograd(_ops.conv2d_backward_weight, grad_output, input, size, *settings)

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
    def vmap(info, in_dims, grad_output, input, size, settings):
        batch = info.batch_size
        grad_output = to_front(grad_output, in_dims[0], batch)
        input = to_front(input, in_dims[1], batch)
        size = (batch * size[0], *size[1:])
        result = Conv2dBackwardWeight.apply(
            into_channels(grad_output), into_channels(input), size, _with_groups(settings, batch)
        )
        return result.unflatten(0, (batch, -1)), 0
