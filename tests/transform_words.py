"""Compositions of torch.func's transforms, to be applied to a function of one vector.

A word of letters g (gradient of a sum of cubes), j (tangent) and v (vmap), the innermost first:
"gj" is forward over reverse. Every letter makes of a function from a vector to a tensor another.
"""

import itertools

import torch
from torch import func
from torch.autograd import forward_ad


def _grad(f):
    return func.grad(lambda z: (f(z) ** 3).sum())


def _jvp(f):
    return lambda z: func.jvp(f, (z,), (torch.sin(z),))[1]


def _vmap(f):
    return lambda z: func.vmap(f)(torch.stack([z, torch.cos(z)]))


def _autograd(f):
    """The classic way, which the layers meet without an active transform of torch.func."""

    def gradient(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad((f(z) ** 3).sum(), z)[0]

    return gradient


def _dual(f):
    def tangent(z):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(z, torch.sin(z)))).tangent

    return tangent


LETTERS = {"g": _grad, "j": _jvp, "v": _vmap, "a": _autograd, "d": _dual}

# All of one to three letters; then the classic ways around those of up to two.
WORDS = ["".join(w) for n in (1, 2, 3) for w in itertools.product("gjv", repeat=n)]
WORDS += [w + "a" for w in WORDS if len(w) < 3]
WORDS += [w + "d" for w in ["", *WORDS] if len(w) < 3 and not set(w) & set("ja")]


def apply_word(word, f):
    """The function that the transforms of the word make of f."""
    for letter in word:
        f = LETTERS[letter](f)
    return f


def split(z, sizes):
    """A vector to tensors of the sizes."""
    parts = z.split([torch.Size(size).numel() for size in sizes])
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def joined(sizes):
    """A random vector of the length that `split` wants."""
    return torch.randn(sum(torch.Size(size).numel() for size in sizes), dtype=torch.float64)
