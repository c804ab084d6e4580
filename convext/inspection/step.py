"""One operation on a tape: what it was called with, where in the model, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """Stands among a step's arguments for the value of an earlier step."""

    step: int


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, or the input, which is step 0.

    Attributes:
        index: its place on the tape.
        name: of the layer that it ran in; where a layer takes several steps, or is called several
            times, each but the last has the operation or a number after it.
        layer: the innermost module that it ran in, as in `model.named_modules()`; "" is the model.
        module: that module.
        op: the operation, an overload such as `torch.ops.aten.relu.default`; None for the input.
        arguments, options: what it was called with; a Ref is an earlier step's value, and tensors
            are weights, buffers and constants.
        value: its output, or the first one that is a tensor.
        part: which output, where the operation returns a list of parts.
    """

    index: int
    name: str
    layer: str
    module: nn.Module
    op: Any
    arguments: tuple
    options: dict[str, Any]
    value: Tensor
    part: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """The steps whose values it reads, in the order of its arguments."""
        return tuple(ref.step for ref in leaves((self.arguments, self.options), Ref))

    @property
    def kind(self) -> str:
        """The operation's name without namespace and overload, as "relu"; "input" for step 0."""
        return "input" if self.op is None else self.op._schema.name.partition("::")[2]

    def named_arguments(self) -> dict[str, Any]:
        """All that the operation was called with, by name, defaults included."""
        names = [argument.name for argument in self.op._schema.arguments]
        defaults = {a.name: a.default_value for a in self.op._schema.arguments}
        return {**defaults, **dict(zip(names, self.arguments, strict=False)), **self.options}


def leaves(tree: object, kind: type) -> list:
    """What there is of a type in nested tuples, lists and dicts, in order."""
    if isinstance(tree, kind):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [leaf for branch in tree for leaf in leaves(branch, kind)]
