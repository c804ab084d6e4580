"""Small or large batches."""

from __future__ import annotations

import math

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant

_WITHOUT = "no norm constant rate "


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    sizes = (batch_size, batch_size // 8, batch_size // 2, 4 * batch_size)
    plain = Network(after=("relu",))
    return {
        **{str(size): Variant(Network(), size, lr) for size in sizes},
        # As the lesson has it when it tries a larger batch.
        **{
            f"{_WITHOUT}{size}": Variant(plain, size, lr, schedule="constant")
            for size in (batch_size // 8, batch_size)
        },
    }


def _measured(results: Results) -> str:
    base = results.trained[0]
    sizes = [label for label in results.trained if not label.startswith(_WITHOUT)]
    small, large = (label for label in results.trained if label.startswith(_WITHOUT))
    compared = (results.sentence(base, label) for label in sizes[1:])
    errors = (
        f"{results.mean(label, 'noise_scale') / int(label):.1f} with {label}"
        for label in sorted(sizes, key=int)
        if math.isfinite(results.mean(label, "noise_scale"))
    )
    return " ".join(
        [
            *compared,
            "Half-way through, where each has come to by then, the noise in a step's gradient, "
            "squared and by the gradient's squared length, which is the noise scale by the batch "
            f"size, is {', '.join(errors) or 'beyond measure'}.",
            results.sentence(small, large),
        ]
    )


EXPERIMENT = Experiment(
    name="batch-size",
    question="What does a larger batch change?",
    claim="Larger batches have more accurate gradients, so that training is more stable, but make "
    "fewer updates. In the network without norm that alone did not help.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "updates", "noise_scale", "time_ratio"),
)
