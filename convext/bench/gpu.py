"""Measuring on a GPU: its clock, its peaks, and what cuDNN is asked for."""

from __future__ import annotations

import re
import subprocess

import torch

from convext.bench.machine import Peaks
from convext.bench.timing import Call, Effort
from convext.errors import UserError

# Short samples: they vary little, and the GPU's clock has no start-up to be averaged away.
EFFORT = Effort(rounds=9, sample=3e-4, seconds=0.5)
COPY_BYTES = tuple(2**power for power in range(18, 31, 2))  # 256 KiB to 1 GiB, read and written
TF32 = "tf32"  # float32 whose factors may be rounded
DTYPES = {
    "float32": torch.float32,
    TF32: torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def check_gpu() -> None:
    """Raise UserError unless there is one that torch finds."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")


class Clock:
    """Seconds of a call on the GPU, by its own events, its operands no longer in the cache.

    What empties the cache also keeps the GPU busy while Python prepares the call, so that a
    call's own time is measured and not the launch's, unless that takes longer.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._other = torch.empty(max(4 * cache, 64 << 20), dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / repeats


def set_precision(dtype: str) -> None:
    """Let cuDNN choose by measurement, and round float32 factors only where that is measured."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype == TF32
    torch.backends.cuda.matmul.allow_tf32 = dtype == TF32


def deterministic(call: Call) -> Call:
    """The same where cuDNN may only choose what gives the same bits each time, as ours does."""

    def run() -> object:
        torch.backends.cudnn.deterministic = True
        try:
            return call()
        finally:
            torch.backends.cudnn.deterministic = False

    return run


def measure_peaks(dtype: str) -> Peaks:
    """Of PyTorch's matrix product and of its copies: no others are at hand."""
    set_precision(dtype)
    size = 8192 if DTYPES[dtype].itemsize == 2 or dtype == TF32 else 4096
    a, b = (torch.randn(size, size, dtype=DTYPES[dtype], device="cuda") for _ in range(2))
    flops = 2 * size**3 / _least(lambda: a @ b)
    copies = {}
    for count in COPY_BYTES:
        source, target = (
            torch.zeros(count // 2, dtype=torch.uint8, device="cuda") for _ in range(2)
        )
        copies[count] = count / _least(lambda s=source, t=target: t.copy_(s))
    return Peaks(flops, copies)


def _least(call: Call, samples: int = 7, repeats: int = 10) -> float:
    """Of a few samples of several calls in a row, operands staying in the cache if they fit."""
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return min(times)


def describe() -> dict[str, object]:
    """The GPU and its software."""
    properties = torch.cuda.get_device_properties()
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        driver = re.match(r"[\d.]+", said)
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver[0] if driver else None,
    }
