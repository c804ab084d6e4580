"""The one timer: ours and PyTorch's in turn, in one process, so that both meet the same machine."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Problems and reference calls are shared with the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

Call = Callable[[], object]


@dataclass
class Comparison:
    """Seconds per call of two functions that do the same, sampled in turn."""

    group: str
    name: str
    ours: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median over neighbouring samples, which share what
        else the machine was doing.
        """
        return statistics.median(t / o for t, o in zip(self.torch, self.ours, strict=True))

    def __str__(self) -> str:
        ours, torch = (
            f"{median_us(times)} ± {spread(times):.0%}" for times in (self.ours, self.torch)
        )
        return f"{self.group:44s} {self.name:24s} {ours:>18s} {torch:>18s} {self.ratio:6.2f}"


HEADER = f"{'':44s} {'':24s} {'ours, µs':>18s} {'torch, µs':>18s} {'ratio':>6s}"


def median_us(times: list[float]) -> str:
    """The median in microseconds, with about three digits."""
    median = statistics.median(times) * 1e6
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def seconds(call: Call, repeats: int) -> float:
    """Wall time of one call, averaged over a few."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(
    group: str, name: str, ours: Call, torch: Call, *, rounds: int = 15, sample: float = 2e-3
) -> Comparison:
    """Time two functions in turn: A B A B ...

    Args:
        group, name: what is compared.
        ours, torch: functions of no argument.
        rounds: samples of each.
        sample: seconds that a sample should at least take, by repeating a short call.
    """
    result = Comparison(group, name)
    pairs = ((ours, result.ours), (torch, result.torch))
    repeats = []
    for call, _ in pairs:
        seconds(call, 2)  # warm-up
        repeats.append(max(1, round(sample / seconds(call, 1))))
    for _ in range(rounds):
        for (call, times), count in zip(pairs, repeats, strict=True):
            times.append(seconds(call, count))
    return result
