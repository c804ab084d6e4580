"""Drop-in Conv2d and BatchNorm2d for PyTorch, on kernels one can read.

`convext.Conv2d` and `convext.BatchNorm2d` take the place of their namesakes in `torch.nn`;
`convext.replace_layers(model)` swaps them into a model that exists.
"""

from convext._build_check import check_build

check_build()

from convext import _C, functional
from convext import fake as fake  # registers shape functions
from convext import flops as flops  # registers what FlopCounterMode counts
from convext.algorithms import algorithms, build_info, last_algorithm, last_reason
from convext.choice import allow_winograd
from convext.conv_block import ConvBlock2d
from convext.fusion import fold, fuse, to_fused, to_unfused, unfuse
from convext.nn import BatchNorm2d, Conv2d, LazyBatchNorm2d, LazyConv2d
from convext.replace import replace_layers, restore_layers
from convext.sync_batch_norm import SyncBatchNorm2d
from convext.tuning import autotune

__version__ = _C.build_info()["convext"]

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvBlock2d",
    "LazyBatchNorm2d",
    "LazyConv2d",
    "SyncBatchNorm2d",
    "algorithms",
    "allow_winograd",
    "autotune",
    "build_info",
    "fold",
    "functional",
    "fuse",
    "last_algorithm",
    "last_reason",
    "replace_layers",
    "restore_layers",
    "to_fused",
    "to_unfused",
    "unfuse",
]
