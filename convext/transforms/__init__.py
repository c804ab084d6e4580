"""The ops under torch.func's transforms and under forward-mode differentiation.

The ops carry C++ autograd Functions, which are quick and know neither. Here the same kernels stand
behind Python Functions that do: `setup_context` for grad and its kin, `vmap`, and `jvp`. The
functions below take the arguments of the ops of the same names.
"""

from convext.transforms.batch_norm_rules import (
    batch_norm_eval,
    batch_norm_train,
    update_in_place,
    update_statistics,
)
from convext.transforms.common import active
from convext.transforms.conv2d_rules import conv2d

__all__ = [
    "active",
    "batch_norm_eval",
    "batch_norm_train",
    "conv2d",
    "update_in_place",
    "update_statistics",
]
