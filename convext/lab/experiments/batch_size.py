"""Small or large batches."""

from __future__ import annotations

import math

from convext.lab.experiment import METRICS, Experiment, Results
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
    scale = results.mean(base, "noise_scale")
    noise = (
        f"Half-way through, with batches of {base}, the gradient noise scale is "
        f"{METRICS['noise_scale'].write(scale)} images: a step's relative squared error is that by "
        f"the batch size, {scale / min(map(int, sizes)):.2g} with {min(sizes, key=int)} and "
        f"{scale / max(map(int, sizes)):.2g} with {max(sizes, key=int)}."
        if math.isfinite(scale)
        else "Half-way through, the noise hides the gradient of the images looked at."
    )
    compared = (results.sentence(base, label) for label in sizes[1:])
    return " ".join([*compared, noise, results.sentence(small, large)])


EXPERIMENT = Experiment(
    name="batch-size",
    question="What does a larger batch change?",
    claim="Larger batches have more accurate gradients, so that training is more stable, but make "
    "fewer updates. In the network without norm that alone did not help.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "updates", "noise_scale", "time_ratio"),
)
