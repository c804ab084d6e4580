"""Exchanges the convolutions, ReLUs and batch norms of a model for fused blocks, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convext.conv_block import ORDERS, ConvBlock2d, has_hooks
from convext.nn import BatchNorm2d, Conv2d
from convext.replace import replace_layers, restore_layers

Model = TypeVar("Model", bound=nn.Module)

# Exactly these: a subclass may compute something else.
_KINDS = {
    nn.Conv2d: "conv",
    Conv2d: "conv",
    nn.ReLU: "relu",
    nn.BatchNorm2d: "norm",
    BatchNorm2d: "norm",
}
# Functions and methods, as the nodes of a graph name them.
_RELU_TARGETS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def fuse(model: Model) -> Model:
    """Make every convolution, ReLU and batch norm in a row a `ConvBlock2d`, in place.

    Rows are found in `nn.Sequential`s (ReLU and batch norm in either order) and in graphs that
    torch.fx traced. Stock layers become ours. Parameters and buffers stay the same objects, under
    the names that `to_fused` gives; the block stands in the convolution's place and `nn.Identity`
    in that of the other two. A row with hooks, with layers used elsewhere too, or with layers of
    other classes is left as it is.

    Args:
        model: a Sequential, a `torch.fx.GraphModule`, or any module that contains some.

    Returns:
        The model.
    """
    uses = _count_uses(model)
    for owner in list(model.modules()):
        for row in _rows(owner, *(tuple(order.split("-")) for order in ORDERS)):
            channels = _part(row, "conv").layer.out_channels
            if _may_change(row, uses) and _part(row, "norm").layer.num_features == channels:
                _fuse_row(owner, row)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place: put the separate layers back where they came from.

    A block that `fuse` did not make becomes an `nn.Sequential` of its layers, `conv`, `relu` and
    `norm`, in its place.

    Returns:
        The model, or its layers where the model itself is a block.
    """
    if isinstance(model, ConvBlock2d):
        return model.layers()
    for owner in list(model.modules()):
        for name, block in _blocks(owner):
            if block.fused_from is None:
                _set(owner, name, block.layers())
            else:
                _unfuse_row(owner, block)
    return model


def to_unfused(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a fused model, under the names that it has unfused.

    Args:
        state_dict: of `model`, or of another one with its layers.
        model: the fused model.
    """
    names = dict(_fused_names(model))
    return {names.get(name, name): value for name, value in state_dict.items()}


def to_fused(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inverse of `to_unfused`: what the fused model's load_state_dict takes.

    Args:
        state_dict: of the separate layers.
        model: the fused model.
    """
    names = {separate: fused for fused, separate in _fused_names(model)}
    return {names.get(name, name): value for name, value in state_dict.items()}


def fold(model: Model) -> Model:
    """A copy for inference in which batch norms are folded into the convolutions before them.

    Folded are blocks with order "conv-norm-relu", and a batch norm that follows its convolution
    at once in an `nn.Sequential` or a traced graph. With r = weight / sqrt(running_var + eps), the
    convolution's weight becomes r * weight and its bias r * (bias - running_mean) + norm's bias,
    computed in float64. A batch norm behind a ReLU can't be moved before it: such a block stays,
    and its evaluation applies the norm to the convolution's results while they are in cache. Left
    alone as well are batch norms that keep no running statistics.

    Returns:
        A new model, equal to `model` in evaluation within rounding; it shares nothing with it.

    Raises:
        RuntimeError: the model, or a batch norm of it, is in training mode.
    """
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, nn.BatchNorm2d)):
            raise RuntimeError(
                f"fold(): expected a model in evaluation mode, but {name or 'the model'} is in "
                "training mode; call model.eval() first"
            )
    model = deepcopy(model)
    if isinstance(model, ConvBlock2d):
        return _folded_block(model) if _can_fold(model) else model
    uses = _count_uses(model)
    for owner in list(model.modules()):
        for name, block in _blocks(owner):
            if _can_fold(block) and uses[id(block)] == 1:
                _set(owner, name, _folded_block(block))
    uses = _count_uses(model)
    for owner in list(model.modules()):
        for row in _rows(owner, ("conv", "norm")):
            conv, norm = row
            if _may_change(row, uses) and norm.layer.running_var is not None:
                _fold_into(conv.layer, norm.layer)
                _remove(owner, norm)
    return model


def _count_uses(model: nn.Module) -> Counter:
    """How many names each module has, by its id."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


@dataclass
class _Part:
    """A layer in a row: in an nn.Sequential by its name, in a graph by its node as well."""

    kind: str  # "conv", "relu" or "norm"
    name: str | None  # None for a ReLU that is a function, in a graph
    layer: nn.Module | None
    node: fx.Node | None = None


def _rows(owner: nn.Module, *orders: tuple[str, ...]) -> list[list[_Part]]:
    """All rows of layers directly below a module whose kinds are one of the orders."""
    if isinstance(owner, fx.GraphModule):
        chains = [_chain(owner, node) for node in owner.graph.nodes]
    elif type(owner).forward is nn.Sequential.forward:
        line = [
            _Part(_KINDS.get(type(layer), ""), name, layer)
            for name, layer in owner._modules.items()
        ]
        chains = [line[first:] for first in range(len(line))]
    else:
        chains = []
    return [
        chain[: len(order)]
        for chain in chains
        for order in orders
        if tuple(part.kind for part in chain[: len(order)]) == order
    ]


def _chain(graph: fx.GraphModule, node: fx.Node) -> list[_Part]:
    """The parts from a node on that nothing but the next one uses."""
    chain = []
    while True:
        kind, name, layer = "", None, None
        if node.op == "call_module":
            name, layer = node.target, graph.get_submodule(node.target)
            calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == name]
            kind = _KINDS.get(type(layer), "") if len(calls) == 1 else ""
        elif node.op in ("call_function", "call_method") and node.target in _RELU_TARGETS:
            kind = "relu"
        chain.append(_Part(kind, name, layer, node))
        if not kind or len(node.users) != 1:
            return chain
        node = next(iter(node.users))


def _may_change(row: list[_Part], uses: Counter) -> bool:
    """Whether the layers are used here alone and by nobody watched."""
    layers = [part.layer for part in row if part.layer is not None]
    return all(uses[id(layer)] == 1 and not has_hooks(layer) for layer in layers)


def _part(row: list[_Part], kind: str) -> _Part:
    return next(part for part in row if part.kind == kind)


def _fuse_row(owner: nn.Module, row: list[_Part]) -> None:
    conv, norm = _part(row, "conv").layer, _part(row, "norm").layer
    stock = type(conv) is nn.Conv2d, type(norm) is nn.BatchNorm2d
    order = "-".join(part.kind for part in row)
    block = ConvBlock2d.from_layers(replace_layers(conv), replace_layers(norm), order)
    block.fused_from = tuple(part.name for part in row)
    block.was_stock = stock
    _set(owner, row[0].name, block)
    for part in row[1:]:
        _remove(owner, part)


def _unfuse_row(owner: nn.Module, block: ConvBlock2d) -> None:
    for layer, was_stock in zip((block.conv, block.norm), block.was_stock, strict=True):
        if was_stock:
            restore_layers(layer)
    layers = dict(block.layers().named_children())
    is_graph = isinstance(owner, fx.GraphModule)
    node = None
    for kind, name in zip(block.order.split("-"), block.fused_from, strict=True):
        if name is not None:
            _set(owner, name, layers[kind])
        if not is_graph:
            continue
        if node is None:
            node = next(node for node in owner.graph.nodes if node.target == name)
            continue
        users = list(node.users)
        with owner.graph.inserting_after(node):
            if name is None:
                following = owner.graph.call_function(F.relu, (node,))
            else:
                following = owner.graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, following)
        node = following
    if is_graph:
        owner.recompile()


def _blocks(owner: nn.Module) -> list[tuple[str, ConvBlock2d]]:
    """The blocks of a module that it calls itself, by their names."""
    if isinstance(owner, fx.GraphModule):  # its names may reach further down
        return [(name, m) for name, m in owner.named_modules() if isinstance(m, ConvBlock2d)]
    return [(name, m) for name, m in owner.named_children() if isinstance(m, ConvBlock2d)]


def _fused_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names in the state_dict of a fused model, with those that they have unfused."""
    seen = set()  # a graph's names reach further down, to blocks that are other modules' too
    for path, owner in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, block in _blocks(owner):
            if block.fused_from is None or block in seen:
                continue
            seen.add(block)
            for kind, separate in zip(block.order.split("-"), block.fused_from, strict=True):
                if kind != "relu":
                    for key in getattr(block, kind).state_dict():
                        yield f"{prefix}{name}.{kind}.{key}", f"{prefix}{separate}.{key}"


def _can_fold(block: ConvBlock2d) -> bool:
    return (
        block.order == "conv-norm-relu"
        and block.is_fused()
        and type(block.conv) is Conv2d  # not a parametrised one
        and block.norm.running_var is not None
    )


def _folded_block(block: ConvBlock2d) -> nn.Sequential:
    layers = block.layers()
    _fold_into(layers.conv, layers.norm)
    layers.norm = nn.Identity()
    return layers


def _fold_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Gives the convolution the parameters that `fold` describes."""

    def double(values: Tensor | None, absent: float) -> Tensor:
        if values is None:
            return norm.running_var.new_full(norm.running_var.shape, absent, dtype=torch.float64)
        return values.detach().double()

    scale = double(norm.weight, 1) / (double(norm.running_var, 1) + norm.eps).sqrt()
    bias = (double(conv.bias, 0) - double(norm.running_mean, 0)) * scale + double(norm.bias, 0)
    weight = conv.weight.detach().double() * scale.reshape(-1, 1, 1, 1)
    dtype, trains = conv.weight.dtype, conv.weight.requires_grad
    conv.bias = nn.Parameter(bias.to(dtype), trains)
    conv.weight = nn.Parameter(weight.to(dtype), trains)


def _remove(owner: nn.Module, part: _Part) -> None:
    """Leaves nn.Identity in a part's place, so that the names of all others stay."""
    if part.name is not None:
        _set(owner, part.name, nn.Identity().train(owner.training))
    if part.node is not None:
        part.node.replace_all_uses_with(part.node.args[0])
        owner.graph.erase_node(part.node)
        owner.recompile()


def _set(owner: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(owner.get_submodule(path), last, layer)
