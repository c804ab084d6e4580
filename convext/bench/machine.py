"""The machine that a benchmark ran on, and its peaks: measured on the spot, not looked up.

Two limits hold every kernel down, and which one it meets first follows from its operations per byte
(Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", 2009): fused multiply-adds in registers, and copying, at the speed of the cache or
memory that holds as many bytes.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convext import _C
from convext.algorithms import build_info
from convext.bench.timing import Call, seconds

COPY_BYTES = tuple(2**power for power in range(15, 28))  # 32 KiB to 128 MiB, read and written
_SAMPLES, _SAMPLE = 7, 8e-3  # of each peak; and about the seconds of one


@dataclass(frozen=True)
class Peaks:
    """What a number of threads does at best."""

    flops: float  # floating-point operations per second
    copies: dict[int, float]  # bytes read and written -> bytes per second

    def bandwidth(self, size: int) -> float:
        """Of a copy that reads and writes this many bytes in all, rounded up as measured."""
        fitting = [measured for measured in self.copies if measured >= size]
        return self.copies[min(fitting, default=max(self.copies))]

    def bound(self, flops: int, size: int) -> float:
        """Seconds below which nothing can do so many operations on so many bytes."""
        return max(flops / self.flops, size / self.bandwidth(size) if size else 0.0)


def measure_peaks(dtype: torch.dtype, threads: int) -> Peaks:
    """Peaks of `threads` threads, each with as much to do as the others.

    16-bit types are summed up in float32, whose peak is theirs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Peaks(_fma_peak(dtype == torch.float64, threads), _copy_peaks(threads))
    finally:
        torch.set_num_threads(before)


def _fma_peak(double_precision: bool, threads: int) -> float:
    steps = 1000 * _repeats(lambda: _C.fma_loop(double_precision, 1000, 1))
    operations = _C.fma_loop(double_precision, steps, threads)
    loop = lambda: _C.fma_loop(double_precision, steps, threads)  # noqa: E731
    return operations / min(seconds(loop, 1) for _ in range(_SAMPLES))


def _copy_peaks(threads: int) -> dict[int, float]:
    half = max(COPY_BYTES) // 2
    source, target = np.ones(half, np.uint8), np.zeros(half, np.uint8)

    def copies(size: int, tasks: int, repeats: int = 1) -> Call:
        return lambda: _C.copy_loop(source[: size // 2], target[: size // 2], repeats, tasks)

    calls = {}
    for size in COPY_BYTES:
        repeats = _repeats(copies(size, 1))
        calls[size, repeats] = copies(size, threads, repeats)
    # Round by round, so that a moment in which the machine does something else spoils one sample of
    # each size at most.
    rounds = [{key: seconds(call, 1) for key, call in calls.items()} for _ in range(_SAMPLES)]
    return {
        size: size * repeats / min(times[size, repeats] for times in rounds)
        for size, repeats in calls
    }


def _repeats(call: Call) -> int:
    """How often one thread repeats it in the time of a sample. One, for what it costs to wake up
    others must be small beside the sample, and not be taken for its work.
    """
    seconds(call, 2)
    return max(1, round(_SAMPLE / seconds(call, 3)))


def describe(device: str = "cpu") -> dict[str, object]:
    """What a reader must know of the machine and the software to judge the figures."""
    built = build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "caches": _caches(),
        "isa": built["cpu_isa"],
        "system": f"{platform.system()} {platform.machine()}",
        "convext": built["convext"],
        "compiler": built["compiler"],
        "torch": torch.__version__,
        "onednn": _onednn_version(),
        "python": platform.python_version(),
        **(_describe_gpu() if device == "cuda" else {}),
    }


def _describe_gpu() -> dict[str, object]:
    from convext.bench import gpu

    return gpu.describe()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """As the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return ", ".join([fields["model name"], *numbers])


def _caches() -> dict[str, str]:
    """Data and unified caches of the first core, as Linux tells them."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (folder / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _onednn_version() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return None
    match = re.search(r"MKL-DNN v([\d.]+)|oneDNN v([\d.]+)", torch.__config__.show())
    return next((text for text in match.groups() if text), None) if match else None
