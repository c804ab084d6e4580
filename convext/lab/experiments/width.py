"""More filters wherever the grid gets smaller, or not."""

from __future__ import annotations

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant

_DOUBLED = "8-16-32-64"


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    widths = (
        (8, 16, 32, 64),
        (8, 8, 8, 8),
        (16, 16, 16, 16),  # about as many multiplications as doubled
        (31, 31, 31, 31),  # about as many parameters
    )
    return {
        "-".join(map(str, each)): Variant(Network(widths=each), batch_size, lr) for each in widths
    }


def _measured(results: Results) -> str:
    return " ".join(results.sentence(_DOUBLED, label) for label in results.trained[1:])


EXPERIMENT = Experiment(
    name="width",
    question="Should filters double where the grid halves?",
    claim="A stride of 2 leaves a quarter of the activations; doubling the filters keeps a layer's "
    "capacity from falling by too much at a time.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "parameters", "multiplications", "time_ratio"),
)
