"""Which algorithms there are, which ran, and what the library was built for."""

from itertools import chain
from typing import NamedTuple

import torch

from convext import _C


class OfEachPass(NamedTuple):
    """What is known of the last convolution of each kind, None before one."""

    forward: str | None
    grad_input: str | None
    grad_weight: str | None


def algorithms(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `algorithm=` takes on a device, besides "auto", which chooses among them.

    And besides "auto+winograd", see `convext.allow_winograd`.

    Raises:
        ValueError: a device for which this build has no kernels.
    """
    kind = torch.device(device).type
    names = _by_device().get(kind)
    if names is None:
        kinds = " and ".join(map(repr, _by_device()))
        raise ValueError(f"device: this build of convext has kernels for {kinds}, not for {kind!r}")
    return names


def _by_device() -> dict[str, tuple[str, ...]]:
    """Of the devices that this build has kernels for."""
    listed = {"cpu": _C.cpu_algorithms(), "cuda": _C.cuda_algorithms()}
    return {kind: names for kind, names in listed.items() if names is not None}


def last_algorithm() -> OfEachPass:
    """What "auto" chose: the algorithm that ran last in each pass, in the whole process."""
    return OfEachPass(*_C.last_algorithms())


def last_reason() -> OfEachPass:
    """Why these were chosen: which row of "auto"'s table fitted, if "auto" it was."""
    return OfEachPass(*_C.last_reasons())


def build_info() -> dict[str, object]:
    """Facts about the compiled library.

    Keys: convext, torch, cuda (versions built against, None without CUDA), cuda_archs, compiler,
    threads, cpu_isas (in the build), cpu_isa (in use; CONVEXT_CPU_ISA forces one).
    """
    return _C.build_info()


def check_algorithm_name(name: str) -> None:
    """Raise ValueError for a name that no device knows."""
    known = tuple(dict.fromkeys(chain.from_iterable(_by_device().values())))
    if name not in ("auto", "auto+winograd", *known):
        raise ValueError(f"algorithm must be 'auto' or one of {known}, got {name!r}")
