"""What the benchmarks share besides the timer: running one under pytest-benchmark, and tables."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import timing
import torch


@dataclass(frozen=True)
class Case:
    """Two functions to compare, made only when they are timed."""

    group: str  # the layer, and what is computed
    name: str  # how we compute it: an algorithm
    make: Callable[[], tuple[timing.Call, timing.Call]]  # ours, torch's

    def __str__(self) -> str:
        return f"{self.group}, {self.name}"

    def compare(self, **options) -> timing.Comparison:
        return timing.compare(self.group, self.name, *self.make(), **options)


def run(benchmark, request, case: Case) -> None:
    """Compare, note the figures, and hand pytest-benchmark our calls for its statistics."""
    comparison = case.compare()
    request.config.comparisons.append(comparison)
    benchmark.group = case.group
    benchmark.extra_info["ratio"] = comparison.ratio
    benchmark.extra_info["ours_us"] = timing.median_us(comparison.ours)
    benchmark.extra_info["torch_us"] = timing.median_us(comparison.torch)
    benchmark.pedantic(case.make()[0], rounds=5, warmup_rounds=1)


def markdown(cases: list[Case], what: str) -> None:
    """Print a table with a row per group and a column per name."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys(case.name for case in cases))
    print(f"{what}; µs per call, torch {torch.__version__}, {options.threads} thread(s);")
    print("in brackets how many times as fast as torch.\n")
    print(f"| | torch | {' | '.join(names)} |")
    print(f"|---|---:|{'---:|' * len(names)}")
    for group, members in groupby(cases, key=lambda case: case.group):
        found = [case.compare(rounds=options.rounds) for case in members]
        cells = [f"{timing.median_us(c.ours)} ({c.ratio:.2f})" for c in found]
        stock = timing.median_us([time for c in found for time in c.torch])
        print(f"| {group} | {stock} | {' | '.join(cells)} |", flush=True)
