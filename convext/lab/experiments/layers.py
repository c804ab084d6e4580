"""This package's layers beside PyTorch's."""

from __future__ import annotations

import numpy as np

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    return {
        layers: Variant(Network(layers=layers), batch_size, lr) for layers in ("convext", "torch")
    }


def _measured(results: Results) -> str:
    apart = [
        np.abs(np.subtract(ours.losses, theirs.losses)) / np.abs(theirs.losses)
        for ours, theirs in zip(results.of("convext"), results.of("torch"), strict=True)
    ]
    first = max(float(each[0]) for each in apart)
    last = max(float(each[-1]) for each in apart)
    return (
        f"{results.sentence('torch', 'convext')} From the same seed the losses of the first step "
        f"differ by {first:.1g} of themselves at most, those of the last by {last:.1g}. PyTorch's "
        f"layers take {results.cell('torch', 'time_ratio')} times as long as convext's."
    )


EXPERIMENT = Experiment(
    name="layers",
    question="Do convext's layers train as PyTorch's do?",
    claim="The lesson's network is PyTorch's; these layers are to give the same, and sooner.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "train_seconds", "time_ratio"),
    panels=("error", "loss", "time"),
)
