"""Whether it matters which kernel computes a convolution."""

from __future__ import annotations

import convext
from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    return {
        name: Variant(Network(algorithm=name), batch_size, lr, may_refuse=True)
        for name in ("auto", *convext.algorithms())
    }


def _measured(results: Results) -> str:
    first, *others = results.trained
    return " ".join(
        f"{results.sentence(first, label)} It takes {results.cell(label, 'time_ratio')} times as "
        f"long as {first}."
        for label in others
    )


EXPERIMENT = Experiment(
    name="algorithms",
    question="Is accuracy the same whatever kernel computes the convolutions?",
    claim="A convolution is one function, and a matrix product is one way to compute it.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "train_seconds", "time_ratio"),
    panels=("error", "loss", "time"),
)
