"""What `convext.lab.ActivationStats` costs: its share of a training step, measured in turn.

python benchmarks/activation_stats.py [--threads N] [--batch-size N] [--rounds N]

A step is that of `convext train` without Lightning: forward, loss, backward, AdamW. Steps without
statistics, with numbers and with histograms take turns in one process, each of a network of its
own; a share is the median over neighbouring steps of what statistics add, relative to the step
without. Measured is the process's CPU time, which other processes disturb less than wall time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from convext.bench.timing import Effort, sample_in_turn
from convext.lab.activation_stats import ActivationStats
from convext.mnist.learner import Learner
from convext.mnist.model import lesson_cnn

KINDS = ("off", "numbers", "histograms")


def step(layers: str, stats: str, images: torch.Tensor, labels: torch.Tensor) -> Callable:
    """A training step of a new network."""
    torch.manual_seed(0)
    model = lesson_cnn(layers)
    optimizer = Learner(model, lr=0.01, total_steps=100).configure_optimizers()["optimizer"]
    if stats != "off":
        ActivationStats(model, histograms=stats == "histograms").attach()

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return call


def cpu_seconds(call: Callable, repeats: int) -> float:
    """CPU time of one call, averaged over a few."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 1, 28, 28)
    labels = torch.randint(10, (args.batch_size,))
    print("layers     step without   with numbers   with histograms")
    for layers in ("convext", "torch"):
        effort = Effort(rounds=args.rounds, seconds=120)
        steps = {stats: step(layers, stats, images, labels) for stats in KINDS}
        times = sample_in_turn(steps, effort, cpu_seconds)
        added = {
            name: statistics.median(t / off - 1 for t, off in zip(found, times["off"], strict=True))
            for name, found in times.items()
        }
        print(
            f"{layers:10} {statistics.median(times['off']) * 1e3:10.1f} ms"
            f" {added['numbers']:+14.1%} {added['histograms']:+17.1%}"
        )


if __name__ == "__main__":
    main()
