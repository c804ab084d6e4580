"""Too high, too low, rising and falling."""

from __future__ import annotations

from convext.lab.experiment import Experiment, Results
from convext.lab.networks import Network
from convext.lab.trial import Variant

DEAD = 0.98  # a share near zero that is a collapse: a healthy ReLU's is up to 85 % here


def _variants(batch_size: int, lr: float) -> dict[str, Variant]:
    # Without norm, which would hide what a rate does.
    plain, normed = Network(after=("relu",)), Network()
    low, high = lr / 1000, 10 * lr
    return {
        f"1cycle to {lr:g}": Variant(plain, batch_size, lr),
        f"1cycle to {lr:g} fixed momentum": Variant(
            plain, batch_size, lr, schedule="1cycle, constant momentum"
        ),
        f"constant {lr:g}": Variant(plain, batch_size, lr, schedule="constant"),
        f"constant {lr / 10:g}": Variant(plain, batch_size, lr / 10, schedule="constant"),
        f"constant {low:g}": Variant(plain, batch_size, low, schedule="constant"),
        f"1cycle to {high:g}": Variant(plain, batch_size, high),
        f"batch norm constant {lr:g}": Variant(normed, batch_size, lr, schedule="constant"),
        f"batch norm 1cycle to {high:g}": Variant(normed, batch_size, high),
    }


def _measured(results: Results) -> str:
    cycled, fixed, constant, *_ = results.trained
    dead = {
        label: int((results.values(label, "near_zero") > DEAD).sum()) for label in results.trained
    }
    said = [
        results.sentence(cycled, constant),
        results.sentence(cycled, fixed),
        *(results.sentence(cycled, label) for label in results.trained[3:]),
    ]
    found = [f"{label} from {n} of {len(results.seeds)} seeds" for label, n in dead.items() if n]
    said.append(
        f"With more than {DEAD:.0%} of the deepest activations near zero at the end: "
        f"{', '.join(found) or 'none'}."
    )
    return " ".join(said)


EXPERIMENT = Experiment(
    name="learning-rate",
    question="What do a rate too high, one too low and 1cycle do to the activations?",
    claim="A constant high rate drives the activations to zero, and again and again they rise and "
    "collapse; 1cycle allows the same rate, since it begins low and ends low, and cycling the "
    "momentum against the rate is part of it.",
    variants=_variants,
    measured=_measured,
    metrics=("accuracy", "valid_loss", "near_zero"),
    panels=("color_dim",),
)
