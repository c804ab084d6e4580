"""The activation before or after the norm."""

from __future__ import annotations

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant

_NORM_FIRST = ("norm", "relu")


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    networks = {
        "relu-norm": Network(),
        "norm-relu": Network(after=_NORM_FIRST),
        # What the last convolution gives are scores; the lesson's helper norms them as well, and a
        # ReLU after that cuts all below zero.
        "relu-norm + norm on scores": Network(last=("norm",)),
        "norm-relu + norm-relu on scores": Network(after=_NORM_FIRST, last=_NORM_FIRST),
        "relu-norm + relu on scores": Network(last=("relu",)),
    }
    return {label: Variant(network, batch_size, lr) for label, network in networks.items()}


def _measured(results: Results) -> str:
    first, *others = results.trained
    return " ".join(results.sentence(first, label) for label in others)


EXPERIMENT = Experiment(
    name="order",
    question="Does the activation belong before or after the norm?",
    claim="It makes a difference, which one run shows: with the norm first accuracy was 89 %.",
    variants=_variants,
    measured=_measured,
)
