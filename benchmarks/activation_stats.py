"""What `convext.lab.ActivationStats` costs: its share of a training step, measured in turn.

python benchmarks/activation_stats.py [--threads N] [--batch-size N] [--rounds N]

A step is that of `convext train` without Lightning: forward, loss, backward, AdamW. Steps without
statistics, with numbers and with histograms take turns in one process; a share is the median over
neighbouring steps of the time that statistics add, relative to the step without.
"""

import argparse
import statistics

import torch
from torch.nn import functional as F

from convext.bench.timing import Effort, sample_in_turn
from convext.lab.activation_stats import ActivationStats
from convext.mnist.learner import Learner
from convext.mnist.model import lesson_cnn


def steps(layers: str, images: torch.Tensor, labels: torch.Tensor) -> dict:
    """The three kinds of step, of one network."""
    model = lesson_cnn(layers)
    configured = Learner(model, lr=0.01, total_steps=100).configure_optimizers()
    optimizer = configured["optimizer"]

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def watched(histograms: bool):
        stats = ActivationStats(model, histograms=histograms)

        def step_with_stats():
            with stats:
                step()

        return step_with_stats

    return {"off": step, "numbers": watched(False), "histograms": watched(True)}


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
        times = sample_in_turn(steps(layers, images, labels), effort)
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
