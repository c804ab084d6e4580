"""Which algorithms there are, which ran, and what the library was built for."""

from typing import NamedTuple

import torch

from convext import _C


class LastAlgorithm(NamedTuple):
    """Names of the algorithms that computed the last convolution of each kind, None before one."""

    forward: str | None
    grad_input: str | None
    grad_weight: str | None


def algorithms(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `algorithm=` takes on a device, besides "auto", which chooses among them.

    Raises:
        ValueError: a device for which this build has no kernels.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        raise ValueError(f"device: this build of convext has kernels for 'cpu', not for {kind!r}")
    return _C.cpu_algorithms()


def last_algorithm() -> LastAlgorithm:
    """What "auto" chose: the algorithm that ran last in each pass, in the whole process."""
    return LastAlgorithm(*_C.last_algorithms())


def build_info() -> dict[str, object]:
    """Facts about the compiled library.

    Keys: convext, torch, cuda (versions built against, None without CUDA), cuda_archs, compiler,
    threads, cpu_isas (in the build), cpu_isa (in use; CONVEXT_CPU_ISA forces one).
    """
    return _C.build_info()


def check_algorithm_name(name: str) -> None:
    """Raise ValueError for a name that no device knows."""
    if name != "auto" and name not in algorithms():
        raise ValueError(f"algorithm must be 'auto' or one of {algorithms()}, got {name!r}")
