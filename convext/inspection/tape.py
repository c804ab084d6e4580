"""A tape: every operation that a model applied to its input, and which cells each of them joins.

`record` runs a model once and notes the operations below autograd, as they reach PyTorch's
dispatcher, so that it makes no difference how the model is written: layers or functions, residual
branches, loops. Receptive fields, precedents and pictures are read off the tape.

Which cells of its input an output cell of an operation reads depends on shapes alone, not on
values. Each operation therefore has a `spread` (convext/inspection/spread.py): a linear map with
positive weights that joins the same cells, a convolution of ones for a convolution or for max
pooling. A set of cells is a mask; the map carries it forwards, and its transpose backwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from convext.inspection.spread import spread
from convext.inspection.step import Ref, Step, leaves

_OVERWRITTEN = -1  # stands for the step of a tensor whose value is no longer that of any step


@dataclass(frozen=True)
class Tape:
    """The steps in the order in which they ran, step 0 being the input.

    Attributes:
        steps: each operation whose output depends on the input.
        outputs: the step that holds the output of each call of each module.
    """

    steps: tuple[Step, ...]
    outputs: dict[str, tuple[int, ...]]

    def find(self, layer: str | int | nn.Module) -> Step:
        """The step that holds the output of a layer's last call.

        Args:
            layer: a module or its name ("" is the model), "input", a step's name or its index.

        Raises:
            ValueError: there is none; the message lists those that there are.
        """
        if isinstance(layer, nn.Module):
            names = [step.layer for step in self.steps if step.module is layer]
            layer = names[-1] if names else type(layer).__name__
        if isinstance(layer, int) and -len(self.steps) <= layer < len(self.steps):
            return self.steps[layer]
        if layer in self.outputs:
            return self.steps[self.outputs[layer][-1]]
        for step in self.steps:
            if step.name == layer:
                return step
        names = ", ".join(
            dict.fromkeys([*(s.name for s in self.steps), *filter(None, self.outputs)])
        )
        raise ValueError(f"layer must be one of {names}, got {layer!r}")

    def precedents(self, step: int, mask: Tensor) -> dict[int, Tensor]:
        """The cells of every earlier step that some cells of one step depend on.

        Args:
            step: its index.
            mask: bool, of its value's shape: the cells.

        Returns:
            By step, those included that are not read: a bool mask of its value's shape. The step
            itself has `mask`.
        """
        reached = {i: torch.zeros(self.steps[i].value.shape, dtype=torch.bool) for i in range(step)}
        reached[step] = mask.bool().cpu()
        for current in reversed(self.steps[1 : step + 1]):
            if reached[current.index].any():
                for source, cells in self.reads(current.index, reached[current.index]).items():
                    reached[source] |= cells
        return reached

    def reads(self, step: int, mask: Tensor) -> dict[int, Tensor]:
        """The cells that some cells of one step read themselves, by the step that they are of.

        Args:
            step: its index.
            mask: bool, of its value's shape: the cells.

        Returns:
            By each step that it reads: a bool mask of that one's value's shape.
        """
        current = self.steps[step]
        inputs = tuple(dict.fromkeys(current.inputs))
        with torch.enable_grad():
            sources = [
                torch.zeros(self.steps[i].value.shape, dtype=torch.float64, requires_grad=True)
                for i in inputs
            ]
            if not sources:
                return {}
            output = spread(current)(*sources)
            # Of ones and zeros at every step, so that no product of many layers grows out of range.
            cells = mask.double().cpu().reshape(output.shape)
            gradients = torch.autograd.grad(output, sources, cells, allow_unused=True)
        return {
            i: torch.zeros(source.shape, dtype=torch.bool) if gradient is None else gradient > 0
            for i, source, gradient in zip(inputs, sources, gradients, strict=True)
        }

    def dependents(self, step: int, mask: Tensor) -> dict[int, Tensor]:
        """The cells of every later step that depend on some cells of one step; as `precedents`."""
        reached = {step: mask.bool().cpu()}
        for current in self.steps[step + 1 :]:
            shape = current.value.shape
            sources = [
                reached.get(i, torch.zeros(self.steps[i].value.shape, dtype=torch.bool)).double()
                for i in dict.fromkeys(current.inputs)
            ]
            if any(source.any() for source in sources):
                reached[current.index] = spread(current)(*sources).reshape(shape) > 0
            else:
                reached[current.index] = torch.zeros(shape, dtype=torch.bool)
        return reached


def record(model: nn.Module, input: Tensor) -> Tape:
    """Runs a model once, in evaluation mode and without gradients, and returns its tape.

    The model is left as it was: same mode, same buffers, no hooks.

    Args:
        model: any module that takes one tensor and returns a tensor, or several.
        input: what it takes, on its device.

    Raises:
        NotImplementedError: the model reads a tensor after overwriting a view of it.
    """
    with _evaluating(model), torch.no_grad():
        recorder = _Recorder(model, input.detach().clone())
        with recorder.watching(), _CircularPadding():
            model(recorder.input)
    return Tape(tuple(recorder.named_steps()), recorder.outputs)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    # Attention layers in evaluation mode are one operation, else the parts that it is made of.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode


class _Recorder(TorchDispatchMode):
    """Notes each operation that reads the input or what came of it."""

    def __init__(self, model: nn.Module, input: Tensor) -> None:
        super().__init__()
        self.input = input
        self.outputs: dict[str, tuple[int, ...]] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = [model]
        # Tensors are kept, so that no other gets the id of one that is gone.
        self._source: dict[int, tuple[Tensor, int]] = {id(input): (input, 0)}
        self._steps = [Step(0, "input", "", model, None, (), {}, input)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = []
        for module in self._names:
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def named_steps(self) -> Iterator[Step]:
        """The steps, with names that are each step's own."""
        ends = {name: steps[-1] for name, steps in self.outputs.items() if name}
        taken = {"input"}
        for step in self._steps[1:]:
            if ends.get(step.layer) == step.index:
                taken.add(step.layer)
        yield self._steps[0]
        for step in self._steps[1:]:
            name = step.layer
            if ends.get(name) != step.index:
                base = f"{name}.{step.kind}" if name else step.kind
                name, number = base, 1
                while name in taken:
                    number += 1
                    name = f"{base}#{number}"
                taken.add(name)
            yield replace(step, name=name)

    def _enter(self, module: nn.Module, _: tuple) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, _: tuple, output: object) -> None:
        self._running.pop()
        sources = [self._source[id(t)][1] for t in leaves(output, Tensor) if id(t) in self._source]
        if sources:
            name = self._names[module]
            self.outputs[name] = (*self.outputs.get(name, ()), sources[0])

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        options = options or {}
        read = [t for t in leaves((arguments, options), Tensor) if id(t) in self._source]
        if not read:
            return op(*arguments, **options)
        noted = _replace((arguments, options), self._stand_in)
        if op._schema.is_mutable:
            self._before_overwriting(arguments[0])
        output = op(*arguments, **options)
        values = leaves(output, Tensor)
        if not values:  # a number that was read, say
            return output
        module = self._running[-1]
        # A list's tensors (of a split, say) are parts of the result; what else an operation
        # returns beside its first tensor (indices of maxima, statistics) is by the way.
        parts = values if isinstance(output, list) else values[:1]
        for number, value in enumerate(parts):
            index = len(self._steps)
            self._steps.append(
                Step(index, "", self._names[module], module, op, *noted, value.detach(), number)
            )
            self._source[id(value)] = (value, index)
        return output

    def _stand_in(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor) or id(leaf) not in self._source:
            return leaf
        step = self._source[id(leaf)][1]
        if step == _OVERWRITTEN:
            raise NotImplementedError(
                f"{self._names[self._running[-1]] or 'the model'} reads a tensor after a view of "
                "it was overwritten in place; write that as an operation that returns a new tensor"
            )
        return Ref(step)

    def _before_overwriting(self, overwritten: Tensor) -> None:
        """The values that steps have noted must stay what they were."""
        storage = overwritten.untyped_storage().data_ptr()
        for number, step in enumerate(self._steps):
            if step.value.untyped_storage().data_ptr() == storage:
                self._steps[number] = replace(step, value=step.value.clone())
        for key, (tensor, _) in self._source.items():
            if tensor is not overwritten and tensor.untyped_storage().data_ptr() == storage:
                self._source[key] = (tensor, _OVERWRITTEN)


class _CircularPadding(TorchFunctionMode):
    """Pads by joining slices, where `F.pad` overwrites views of an empty tensor."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is F.pad:
            bound = _PAD.bind(*arguments, **options)
            if bound.arguments.get("mode") == "circular" and min(bound.arguments["pad"]) >= 0:
                return _wrapped(bound.arguments["input"], bound.arguments["pad"])
        return function(*arguments, **options)


_PAD = inspect.signature(F.pad)


def _wrapped(input: Tensor, pad: Sequence[int]) -> Tensor:
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = input.dim() - 1 - number
        end, start = (
            input.narrow(dim, input.shape[dim] - before, before),
            input.narrow(dim, 0, after),
        )
        input = torch.cat([end, input, start], dim)
    return input


def _replace(tree: object, of_leaf) -> Any:
    if isinstance(tree, dict):
        return {key: _replace(branch, of_leaf) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_replace(branch, of_leaf) for branch in tree)
    return of_leaf(tree)
