"""Batch norm behind Python autograd Functions.

First derivatives and the tangent of the output are made of the kernels again. What comes after them
is written out in differentiable torch operations, as in csrc/autograd/batch_norm.cpp, whose
notation this file shares: r = 1 / sqrt(var + eps), y = (x - mean) * r, means over the batch, and

    P(u) = u - mean(u) - y mean(u y)

The statistics are never differentiated as tensors of their own: in training they are functions of
input, and every formula counts them in.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convext.transforms.common import (
    Function,
    below_autograd,
    from_channels,
    in_graph,
    into_channels,
    to_front,
)

_ops = torch.ops.convext
_update = _ops.update_running_statistics.default


@in_graph
def batch_norm_train(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op batch_norm_train: output, mean and biased variance of the batch."""
    return BatchNormTrain.apply(input, weight, bias, eps)


@in_graph
def batch_norm_eval(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The op batch_norm_eval."""
    return BatchNormEval.apply(input, mean, var, weight, bias, eps)


def update_in_place(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Moves the running statistics towards those of a batch of `count` values per channel.

    The batch's variance comes biased, as the ops give it, and goes in unbiased.
    """
    unbiased = momentum * count / (count - 1)
    if not (torch.compiler.is_compiling() or isinstance(unbiased, Tensor)):
        _update(running_mean, running_var, mean, var, momentum, unbiased)
        return
    # torch.compile has symbols for numbers and torch.jit.trace tensors, which torch's own
    # operations take.
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var, alpha=unbiased)


@in_graph
def update_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """`update_in_place` under transforms.

    torch.func refuses operations in place on tensors that it does not track; in a Function's
    forward they are allowed.
    """
    UpdateStatistics.apply(running_mean, running_var, mean, var, momentum, count)


def _refuse(what: str) -> None:
    raise RuntimeError(
        "batch_norm(): not differentiable with respect to running_mean and running_var, got one "
        f"that {what}"
    )


def _refuse_tangents(*tangents: Tensor | None) -> None:
    if any(tangent is not None for tangent in tangents):
        _refuse("carries a tangent")


def _fold_channels(batch_size: int, tensor: Tensor | None, batch_dim: int | None) -> Tensor | None:
    """(B, C) of one value per channel to (B * C), the axis B anywhere or absent."""
    return None if tensor is None else to_front(tensor, batch_dim, batch_size).flatten(0, 1)


def _fold_input(batch_size: int, tensor: Tensor, batch_dim: int | None) -> Tensor:
    return into_channels(to_front(tensor, batch_dim, batch_size))


def _gradients(ctx, grad_output, training):
    """Of (input, weight, bias)."""
    input, weight, mean, var = ctx.saved_tensors
    of_input, of_weight, of_bias = BatchNormBackward.apply(
        grad_output, input, mean, var, weight, ctx.eps, training
    )
    return (
        of_input,
        None if weight is None else of_weight,
        None if ctx.bias_dtype is None else of_bias.to(ctx.bias_dtype),
    )


def _tangent(ctx, saved, tangents, training, normalise):
    """Of output, for tangents of (input, weight, bias); `normalise` takes another weight and bias.

    P is symmetric, so that the tangent of input takes the way of a gradient; and the output is
    linear in weight and bias.
    """
    input, weight, mean, var = saved
    of_input, of_weight, of_bias = tangents
    terms = []
    if of_input is not None:
        terms.append(
            BatchNormBackward.apply(of_input, input, mean, var, weight, ctx.eps, training)[0]
        )
    if of_weight is not None:
        terms.append(normalise(of_weight, of_bias))
    elif of_bias is not None:
        terms.append(normalise(torch.zeros_like(of_bias), of_bias))
    return sum(terms[1:], terms[0]) if terms else None


class BatchNormTrain(Function):
    """(input, weight, bias, eps) to (output, mean, var)."""

    @staticmethod
    def forward(input, weight, bias, eps):
        return below_autograd(_ops.batch_norm_train, input, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.eps = inputs
        _, mean, var = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, var)
        ctx.save_for_forward(input, weight, mean, var)

    @staticmethod
    def backward(ctx, grad, *_):
        return *_gradients(ctx, grad, True), None

    @staticmethod
    def tangent(ctx, saved, *tangents):
        def normalise(weight, bias):
            return BatchNormTrain.apply(saved[0], weight, bias, ctx.eps)[0]

        return _tangent(ctx, saved, tangents[:3], True, normalise), None, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, eps):
        fold = partial(_fold_channels, info.batch_size)
        output, *statistics = BatchNormTrain.apply(
            _fold_input(info.batch_size, input, in_dims[0]),
            fold(weight, in_dims[1]),
            fold(bias, in_dims[2]),
            eps,
        )
        mean, var = (t.unflatten(0, (info.batch_size, -1)) for t in statistics)
        if in_dims[0] is None:  # one input has one mean, whatever the weights
            return (from_channels(output, info.batch_size), mean[0], var[0]), (0, None, None)
        return (from_channels(output, info.batch_size), mean, var), (0, 0, 0)


class BatchNormEval(Function):
    """(input, mean, var, weight, bias, eps) to output."""

    @staticmethod
    def forward(input, mean, var, weight, bias, eps):
        return below_autograd(_ops.batch_norm_eval, input, mean, var, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, mean, var, weight, bias, ctx.eps = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, var)
        ctx.save_for_forward(input, weight, mean, var)

    @staticmethod
    def backward(ctx, grad):
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # torch.compile lets them get here
            _refuse("requires a gradient")
        of_input, of_weight, of_bias = _gradients(ctx, grad, False)
        return of_input, None, None, of_weight, of_bias, None

    @staticmethod
    def tangent(ctx, saved, input_tangent, mean_tangent, var_tangent, *parameter_tangents):
        _refuse_tangents(mean_tangent, var_tangent)
        input, _, mean, var = saved

        def normalise(weight, bias):
            return BatchNormEval.apply(input, mean, var, weight, bias, ctx.eps)

        tangents = (input_tangent, *parameter_tangents[:2])
        return _tangent(ctx, saved, tangents, False, normalise)

    @staticmethod
    def vmap(info, in_dims, input, mean, var, weight, bias, eps):
        parameters = (
            _fold_channels(info.batch_size, t, dim)
            for t, dim in zip((mean, var, weight, bias), in_dims[1:5], strict=True)
        )
        input = _fold_input(info.batch_size, input, in_dims[0])
        output = BatchNormEval.apply(input, *parameters, eps)
        return from_channels(output, info.batch_size), 0


class BatchNormBackward(Function):
    """(grad_output, input, mean, var, weight, eps, training) to gradients.

    They are of (input, weight, bias), the latter two also where weight is absent.
    """

    @staticmethod
    def forward(grad_output, input, mean, var, weight, eps, training):
        return below_autograd(
            _ops.batch_norm_backward, grad_output, input, mean, var, weight, eps, training
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, ctx.training = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, of_grad_input, of_grad_weight, of_grad_bias):
        grad_output, input, mean, var, weight = ctx.saved_tensors
        f = _Formula(input, mean, var, ctx.eps, ctx.training)
        g, w, r, y = f.wide(grad_output), f.per_channel(weight, 1), f.r, f.y
        # Cotangents of the three results.
        v = f.wide(of_grad_input)
        a, b = f.per_channel(of_grad_weight, 0), f.per_channel(of_grad_bias, 0)
        v_P_g = v * f.P(g)
        of_g = w * r * f.P(v) + a * y + b
        of_x = a * g * r
        if ctx.training:
            of_y = a * g - w * r * (v * f.mean(g * y) + g * f.mean(v * y))
            of_x = r * f.P(of_y) - y * (r * r * w * f.mean(v_P_g))
        of_w = None if weight is None else f.sum(v_P_g * r).to(weight.dtype)
        return of_g.to(grad_output.dtype), of_x.to(input.dtype), None, None, of_w, None, None

    @staticmethod
    def tangent(ctx, saved, g_tangent, x_tangent, mean_tangent, var_tangent, w_tangent, *_):
        grad_output, input, mean, var, weight = saved
        f = _Formula(input, mean, var, ctx.eps, ctx.training)
        g, w, r, y = f.wide(grad_output), f.per_channel(weight, 1), f.r, f.y
        dg, dx, dw = f.wide(g_tangent), f.wide(x_tangent), f.per_channel(w_tangent, 0)
        dy = r * f.P(dx)
        of_grad_input = w * r * f.P(dg) + dw * r * f.P(g)
        if ctx.training:
            dr = -r * r * f.mean(y * dx)
            of_grad_input = of_grad_input + w * (
                dr * f.P(g) - r * (dy * f.mean(g * y) + y * f.mean(g * dy))
            )
        dtype = f.dtype if weight is None else weight.dtype
        return (
            of_grad_input.to(input.dtype),
            f.sum(dg * y + g * dy).to(dtype),
            f.sum(dg).to(dtype),
        )

    @staticmethod
    def vmap(info, in_dims, grad_output, input, mean, var, weight, eps, training):
        grad_output, input = (
            _fold_input(info.batch_size, t, dim)
            for t, dim in zip((grad_output, input), in_dims[:2], strict=True)
        )
        parameters = (
            _fold_channels(info.batch_size, t, dim)
            for t, dim in zip((mean, var, weight), in_dims[2:5], strict=True)
        )
        grad_input, *others = BatchNormBackward.apply(
            grad_output, input, *parameters, eps, training
        )
        grad_weight, grad_bias = (t.unflatten(0, (info.batch_size, -1)) for t in others)
        return (from_channels(grad_input, info.batch_size), grad_weight, grad_bias), (0, 0, 0)


class _Formula:
    """The terms of the formulas above, in the dtype that the kernels sum in."""

    def __init__(
        self, input: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool
    ) -> None:
        self.training = training
        self.dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.others = [d for d in range(input.dim()) if d != 1]  # the axes but the channels'
        x = input.to(self.dtype)
        self.zeros = torch.zeros_like(x)
        if training:  # from input once more, so that they are differentiated
            centred = x - self.mean(x)
            self.r = (self.mean(centred * centred) + eps).rsqrt()
        else:
            centred = x - self.per_channel(mean, 0)
            self.r = (self.per_channel(var, 1) + eps).rsqrt()
        self.y = centred * self.r

    def wide(self, tensor: Tensor | None) -> Tensor:
        """Of (N, C, *); zeros for a cotangent or tangent that is absent."""
        return self.zeros if tensor is None else tensor.to(self.dtype)

    def per_channel(self, tensor: Tensor | None, absent: float) -> Tensor | float:
        """(C) to a shape that broadcasts over (N, C, *)."""
        if tensor is None:
            return absent
        return tensor.to(self.dtype).reshape(1, -1, *[1] * (len(self.others) - 1))

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor.mean(self.others, keepdim=True)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.sum(self.others)

    def P(self, u: Tensor) -> Tensor:  # noqa: N802
        if not self.training:
            return u
        return u - self.mean(u) - self.y * self.mean(u * self.y)


class UpdateStatistics(Function):
    """Arguments of update_in_place to nothing. It is elementwise: vmap only aligns the axes."""

    @staticmethod
    def forward(*arguments):
        update_in_place(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def tangent(ctx, saved, *tangents):
        _refuse_tangents(*tangents)

    @staticmethod
    def vmap(info, in_dims, running_mean, running_var, mean, var, momentum, count):
        statistics = (running_mean, running_var, mean, var)
        if in_dims[2] is not None and any(
            running is not None and dim is None
            for running, dim in zip(statistics[:2], in_dims, strict=False)
        ):
            raise RuntimeError(
                "batch_norm(): got a batched input while running_mean or running_var, which "
                "are updated in place, are not batched; use track_running_stats=False, "
                "torch.func.replace_all_batch_norm_modules_ or eval mode, or batch them too"
            )
        fronted = (
            t if dim is None else t.movedim(dim, 0)
            for t, dim in zip(statistics, in_dims[:4], strict=True)
        )
        UpdateStatistics.apply(*fronted, momentum, count)
        return None, None
