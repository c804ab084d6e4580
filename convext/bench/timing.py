"""The one timer: what is compared runs in turn, in one process, and so meets the same machine."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Effort:
    """How much is spent on one comparison."""

    rounds: int = 15  # samples of each call, or fewer where `seconds` are over, but at least 3
    sample: float = 2e-3  # seconds that a sample takes at least, by repeating a short call
    seconds: float = 4.0  # after these no round is begun


def seconds(call: Call, repeats: int) -> float:
    """Wall time of one call, averaged over a few."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def sample_in_turn(
    calls: Mapping[Key, Call],
    effort: Effort | None = None,
    seconds: Callable[[Call, int], float] = seconds,
) -> dict[Key, list[float]]:
    """Time functions that do the same: A B C, B A C, C A B, ...

    Every function is warmed up first. The order of each round is another one, the same on every
    run, so that none always comes after one and the same neighbour; and what a neighbour left of
    the caches is the affair of a call before each sample that is not timed, unless calls are too
    long to be repeated.

    Args:
        seconds: the clock, which calls a function a few times and averages.

    Returns:
        Seconds per call, a sample for every round; samples at one place of the lists are neighbours
        in time.
    """
    effort = effort or Effort()
    repeats = {}
    for key, call in calls.items():
        call()
        repeats[key] = max(1, round(effort.sample / seconds(call, 1)))
        seconds(call, min(2, repeats[key]))
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + effort.seconds
        for done in range(effort.rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            shuffle(order)
            for key in order:
                if repeats[key] > 1:
                    calls[key]()
                times[key].append(seconds(calls[key], repeats[key]))
    finally:
        if collecting:
            gc.enable()
    return times


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def speedup(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median over neighbouring samples, which share what else
    the machine was doing.
    """
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
