"""Which normalisation, if any."""

from __future__ import annotations

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant

# The lesson normalises the last convolution's output too: ten maps of 1x1. Instance norm takes the
# mean from each map of one number, which leaves 0, and then adds beta: every image has the same
# scores, and the best the network can say is the class that is most frequent.
LAST = ("norm",)


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    networks = {
        "batch": Network(),
        "none": Network(after=("relu",)),
        "instance": Network(norm="instance"),
        "group": Network(norm="group"),
        "layer": Network(norm="layer"),
        "batch + last layer": Network(last=LAST),
        "instance + last layer": Network(norm="instance", last=LAST),
        "instance + last layer unchecked": Network(norm="channel", last=LAST),
    }
    return {
        label: Variant(network, batch_size, lr, may_refuse="instance +" in label)
        for label, network in networks.items()
    }


def _measured(results: Results) -> str:
    others = [label for label in results.trained if label not in ("batch", "none")]
    return " ".join(
        [
            results.sentence("none", "batch"),
            *(results.sentence("batch", label) for label in others),
            "Instance norm of a 1x1 map is a constant, whatever the image. PyTorch's layer refuses "
            "it; group norm with one channel a group computes the same and does not.",
        ]
    )


EXPERIMENT = Experiment(
    name="norms",
    question="Does it matter which normalisation the network has?",
    claim="Batch norm keeps activations away from zero, and with it training is fast and good; "
    "other norms are worth a try; with "
    "instance norm it got 10 %.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "near_zero", "time_ratio"),
)
