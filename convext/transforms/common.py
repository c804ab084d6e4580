"""What the rules of both layers share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only


def active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way."""
    # Private names of torch, used in this file only; tests/test_transforms.py fails where one goes.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_graph(function):
    """Lets torch.compile write a call of the function into its graph, rather than trace it.

    The compiler then runs it with the transforms in force, and sees the ops that come out. Traced,
    it would break the graph at `below_autograd`.
    """

    def register() -> None:
        torch.compiler.allow_in_graph(function)

    # Has the tracer run it. torch.compiler.assume_constant_result does the same, and allow_in_graph
    # could be called here and now, but both import the compiler: two seconds for every user.
    register._dynamo_marked_constant = True

    @functools.wraps(function)
    def call(*arguments):
        if torch.compiler.is_dynamo_compiling():
            register()
        return function(*arguments)

    return call


class Function(torch.autograd.Function):
    """An autograd Function whose tangent can be differentiated forward once more.

    torch runs `jvp` with forward-mode differentiation off, for the transforms around the one at
    work too: a tangent's tangent would be zero, silently. So subclasses give `tangent` instead,
    with the arguments of jvp after the saved tensors, and here it runs one level further out with
    differentiation on, as torch runs `forward`. (Without torch.func there is no level further out:
    torch refuses to nest forward_ad.dual_level.)
    """

    @classmethod
    def jvp(cls, ctx, *tangents):
        saved = ctx.saved_tensors
        if not torch._C._are_functorch_transforms_active():
            return cls.tangent(ctx, saved, *tangents)
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()

        def unwrap(tensor):
            return torch._C._functorch._unwrap_for_grad(tensor, level)

        def wrap(tensor):
            return torch._C._functorch._wrap_for_grad(tensor, level)

        saved, tangents = tree_map_only(Tensor, unwrap, (saved, tangents))
        with forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            result = cls.tangent(ctx, saved, *tangents)
        return tree_map_only(Tensor, wrap, result)


def below_autograd(op, *arguments):
    """Calls an op below its own autograd, which is a Python Function's here."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def to_front(tensor: Tensor, batch_dim: int | None, batch_size: int) -> Tensor:
    """The batched axis in front, made where there is none."""
    if batch_dim is None:
        return tensor.expand(batch_size, *tensor.shape)
    return tensor.movedim(batch_dim, 0)


def into_batch(tensor: Tensor) -> Tensor:
    """(B, N, C, *) to (B * N, C, *)."""
    return tensor.flatten(0, 1)


def into_channels(tensor: Tensor) -> Tensor:
    """(B, N, C, *) to (N, B * C, *): every member of the batch has channels of its own."""
    return tensor.transpose(0, 1).flatten(1, 2)


def from_channels(tensor: Tensor, batch_size: int) -> Tensor:
    """(N, B * C, *) to (B, N, C, *)."""
    return tensor.unflatten(1, (batch_size, -1)).transpose(0, 1)
