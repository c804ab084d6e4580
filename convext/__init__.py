"""Drop-in Conv2d and BatchNorm2d for PyTorch, on kernels one can read.

`convext.Conv2d` and `convext.BatchNorm2d` take the place of their namesakes in `torch.nn`;
`convext.replace_layers(model)` swaps them into a model that exists.
"""

from importlib.metadata import PackageNotFoundError, version

from convext._build_check import check_build

check_build()

from convext import _C, functional  # noqa: E402

__all__ = ["functional"]
