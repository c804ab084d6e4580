"""The accuracies that docs/lesson13.md names: variants of the lesson's network, several seeds each.

python benchmarks/lesson13.py           what the page says, on MNIST; five minutes on one thread
python benchmarks/lesson13.py norm      the rows whose names hold a word
python benchmarks/lesson13.py --data digits --seeds 2 --epochs 4
"""

import argparse
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import nn

import convext
from convext.mnist.data import load_data
from convext.mnist.loop import accuracy, fit
from convext.mnist.model import CONVOLUTIONS

Norm = Callable[[int], nn.Module]


def network(
    norm: Norm | None = None, *, norm_first: bool = False, end: str = "", first: int = 5
) -> nn.Sequential:
    """The lesson's network.

    Args:
        norm: makes the normalisation for so many channels, if any.
        norm_first: norm before ReLU, not after it.
        end: what follows the last convolution: "", "relu" or "norm".
        first: size of the first kernel.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, size in CONVOLUTIONS:
        size = first if inputs == 1 else size
        layers.append(convext.Conv2d(inputs, outputs, size, stride=2, padding=size // 2))
        if outputs == 10:  # class scores
            break
        block = [nn.ReLU(), norm(outputs)] if norm else [nn.ReLU()]
        layers.extend(reversed(block) if norm_first else block)
    if end:
        layers.append(nn.ReLU() if end == "relu" else norm(10))
    return nn.Sequential(*layers, nn.Flatten())


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


CONSTANT = {"one_cycle": False}
BATCH = convext.BatchNorm2d
# Name: the network's arguments, and those of `fit` where they differ from the options'.
ROWS: dict[str, tuple[dict, dict]] = {
    "no norm, batches of 64, constant rate": ({}, {"batch_size": 64, **CONSTANT}),
    "no norm, constant rate": ({}, CONSTANT),
    "no norm": ({}, {}),
    "no norm, first kernel 3x3": ({"first": 3}, {}),
    "batch norm after ReLU, first kernel 3x3": ({"norm": BATCH, "first": 3}, {}),
    "batch norm after ReLU": ({"norm": BATCH}, {}),
    "batch norm before ReLU": ({"norm": BATCH, "norm_first": True}, {}),
    "batch norm after ReLU, ReLU on the scores": ({"norm": BATCH, "end": "relu"}, {}),
    "batch norm after ReLU, norm of the scores": ({"norm": BATCH, "end": "norm"}, {}),
    "group norm, 4 groups": ({"norm": lambda c: nn.GroupNorm(4, c)}, {}),
    "group norm, 1 group": ({"norm": lambda c: nn.GroupNorm(1, c)}, {}),
    "instance norm": ({"norm": instance_norm}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--data", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.06)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(options.data)
    print("| network | mean | std | least | most | below 20% |\n| --- |" + " ---: |" * 5)
    for name, (arguments, changed) in ROWS.items():
        if options.word not in name:
            continue
        accuracies = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = network(**arguments)
            how = {"epochs": options.epochs, "batch_size": options.batch_size, "seed": seed}
            fit(model, data.train, options.lr, **{**how, **changed})
            accuracies.append(100 * accuracy(model, data.valid))
        figures = (mean(accuracies), stdev(accuracies), min(accuracies), max(accuracies))
        collapsed = sum(value < 20 for value in accuracies)
        cells = [name, *(f"{figure:.2f}" for figure in figures), f"{collapsed} of {options.seeds}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
