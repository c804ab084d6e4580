"""A first kernel of 3x3 or of 5x5."""

from __future__ import annotations

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    return {
        f"{size}x{size}": Variant(Network(first_kernel=size), batch_size, lr) for size in (5, 3)
    }


def _measured(results: Results) -> str:
    return results.sentence("3x3", "5x5")


EXPERIMENT = Experiment(
    name="first-kernel",
    question="Should the first kernel be 5x5?",
    claim="With 3x3, eight outputs are computed from only nine pixels, which forces the network to "
    "learn little; 5x5 computes them from 25.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "parameters", "multiplications", "time_ratio"),
)
