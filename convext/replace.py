"""Swaps stock layers of a model for ours, and back."""

from typing import TypeVar

from torch import nn

from convext.algorithms import check_algorithm_name
from convext.nn import BatchNorm2d, Conv2d
from convext.sync_batch_norm import SyncBatchNorm2d

Model = TypeVar("Model", bound=nn.Module)

_OURS = {nn.Conv2d: Conv2d, nn.BatchNorm2d: BatchNorm2d}
_STOCK = {**{ours: stock for stock, ours in _OURS.items()}, SyncBatchNorm2d: nn.SyncBatchNorm}


def replace_layers(model: Model, *, algorithm: str = "auto") -> Model:
    """Make every `nn.Conv2d` and `nn.BatchNorm2d` of a model ours, in place; return the model.

    A layer changes its class and nothing else: Parameters, buffers, hooks and the names in the
    state_dict are the very same objects, so optimizers and checkpoints go on working. Only layers
    of exactly these types are changed, for a subclass may compute something else.

    Args:
        model: any module, also a single layer.
        algorithm: for the convolutions, see `convext.Conv2d`.
    """
    check_algorithm_name(algorithm)
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
            if isinstance(module, Conv2d):
                module.algorithm = algorithm
    return model


def restore_layers(model: Model) -> Model:
    """Undo `replace_layers`: make our layers stock ones again, in place; return the model.

    A `SyncBatchNorm2d` becomes a `torch.nn.SyncBatchNorm`.
    """
    for module in model.modules():
        if type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)]
            vars(module).pop("algorithm", None)
    return model
