"""The experiments of `convext lab`: a module each, listed here."""

from convext.lab.experiment import Experiment
from convext.lab.experiments import (
    algorithms,
    batch_size,
    first_kernel,
    layers,
    learning_rate,
    norms,
    order,
    width,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        norms,
        order,
        batch_size,
        learning_rate,
        first_kernel,
        width,
        algorithms,
        layers,
    )
}
