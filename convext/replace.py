"""Swaps stock layers of a model for ours, and back."""

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from convext.algorithms import check_algorithm_name
from convext.nn import BatchNorm2d, Conv2d, LazyBatchNorm2d, LazyConv2d
from convext.sync_batch_norm import SyncBatchNorm2d

Model = TypeVar("Model", bound=nn.Module)

_OURS = {
    nn.Conv2d: Conv2d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.LazyConv2d: LazyConv2d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
}
_STOCK = {**{ours: stock for stock, ours in _OURS.items()}, SyncBatchNorm2d: nn.SyncBatchNorm}


def _change_class(module: nn.Module, table: dict[type, type]) -> bool:
    """Change the layer's class to its counterpart in the table; tell whether it has one."""
    counterpart = table.get(parametrize.type_before_parametrizations(module))
    if counterpart is None:
        return False
    if parametrize.is_parametrized(module):
        # Parametrizations live in a class of the layer's own, as properties in front of the type
        # that it had. A copied layer shares that class: make another, and leave this as it is.
        own = type(module)
        members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        counterpart = type(own.__name__, (counterpart,), members)
    module.__class__ = counterpart
    return True


def replace_layers(model: Model, *, algorithm: str = "auto") -> Model:
    """Make every `nn.Conv2d` and `nn.BatchNorm2d` of a model ours, in place; return the model.

    A layer changes its class and nothing else: Parameters, buffers, hooks and the names in the
    state_dict are the very same objects, so optimizers and checkpoints go on working. Only layers
    of exactly these types and their lazy forms are changed, for a subclass may compute something
    else; but a layer with parametrizations (`torch.nn.utils.parametrize`) counts as what it was
    before.

    Args:
        model: any module, also a single layer.
        algorithm: for the convolutions, see `convext.Conv2d`.
    """
    check_algorithm_name(algorithm)
    for module in model.modules():
        if _change_class(module, _OURS) and isinstance(module, Conv2d):
            module.algorithm = algorithm
    return model


def restore_layers(model: Model) -> Model:
    """Undo `replace_layers`: make our layers stock ones again, in place; return the model.

    A `SyncBatchNorm2d` becomes a `torch.nn.SyncBatchNorm`.
    """
    for module in model.modules():
        if _change_class(module, _STOCK):
            vars(module).pop("algorithm", None)
    return model
