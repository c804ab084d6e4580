"""Experiments: variants of one training run that differ in one thing, each from several seeds."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch

import convext
from convext.lab.trial import Run, Variant, refusal, run_variant
from convext.mnist.data import Dataset, Split
from convext.mnist.run_folder import write_json
from convext.mnist.settings import DEFAULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A difference of so many standard errors is taken for more than chance. With three seeds a side
# chance alone goes beyond it once in 25 times (Student's t, 4 degrees of freedom).
CLEAR = 3.0


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        title: the column's head.
        write: a value as text.
        unit: after mean and spread.
        missing: instead of a mean that is not finite.
    """

    title: str
    write: Callable[[float], str]
    unit: str = ""
    missing: str = "not finite"


METRICS = {
    "accuracy": Metric("accuracy", lambda x: f"{100 * x:.2f}", " %"),
    "valid_loss": Metric("valid loss", lambda x: f"{x:.4f}"),
    "train_loss": Metric("train loss", lambda x: f"{x:.4f}"),
    "train_seconds": Metric("train seconds", lambda x: f"{x:.2f}"),
    "time_ratio": Metric("CPU time ratio", lambda x: f"{x:.2f}"),
    "updates": Metric("updates", lambda x: f"{x:,.0f}"),
    "parameters": Metric("parameters", lambda x: f"{x:,.0f}"),
    "multiplications": Metric("multiplications", lambda x: f"{x:,.0f}"),
    "near_zero": Metric("near zero", lambda x: f"{100 * x:.1f}", " %"),
    "noise_scale": Metric("noise scale", lambda x: f"{x:,.0f}", missing="hidden by noise"),
}


@dataclass(frozen=True)
class Experiment:
    """One question, and the runs that answer it.

    Attributes:
        name: as in `convext lab NAME`.
        question: one line.
        claim: what the lesson says.
        variants: from a batch size and a learning rate, those of the data set's defaults, to the
            variants by label. The first is the one that times are compared with.
        measured: from results to what they say, in sentences.
        metrics: the table's columns, names of METRICS.
        panels: of the plot, "error", "loss", "time" and "color_dim".
    """

    name: str
    question: str
    claim: str
    variants: Callable[[int, float], Mapping[str, Variant]]
    measured: Callable[[Results], str]
    metrics: tuple[str, ...] = ("accuracy", "valid_loss", "time_ratio")
    panels: tuple[str, ...] = ("error", "loss")


@dataclass(frozen=True)
class Comparison:
    """A metric's means of two variants.

    Attributes:
        difference: the second's less the first's.
        error: its standard error; NaN with one seed.
        clear: whether it is more than chance can well explain: beyond CLEAR standard errors.
    """

    difference: float
    error: float

    @property
    def clear(self) -> bool:
        return abs(self.difference) > CLEAR * self.error


@dataclass(frozen=True)
class Results:
    """What an experiment's runs gave.

    Attributes:
        experiment: which one.
        settings: data, images, epochs, threads, versions.
        labels: of all variants, in order.
        runs: one for each variant and seed, in the order they were made.
        refused: variants that make no step, and the error that says why.
    """

    experiment: Experiment
    settings: dict
    labels: tuple[str, ...]
    runs: tuple[Run, ...]
    refused: dict[str, str]

    @property
    def trained(self) -> tuple[str, ...]:
        """The labels of the variants that were trained."""
        return tuple(label for label in self.labels if label not in self.refused)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def of(self, label: str) -> tuple[Run, ...]:
        """A variant's runs, one for each seed.

        Raises:
            ValueError: no such variant was trained.
        """
        if label not in self.trained:
            raise ValueError(f"label must be one of {', '.join(self.trained)}, got {label!r}")
        return tuple(run for run in self.runs if run.variant == label)

    def values(self, label: str, metric: str) -> np.ndarray:
        """A metric of each of a variant's runs (seeds,).

        "time_ratio" is the run's cpu_seconds by those of the first trained variant from the same
        seed, which was trained shortly before.
        """
        if metric == "time_ratio":
            base = self.values(self.trained[0], "cpu_seconds")
            return self.values(label, "cpu_seconds") / base
        return np.array([run.figures.get(metric, math.nan) for run in self.of(label)])

    def mean(self, label: str, metric: str) -> float:
        return float(self.values(label, metric).mean())

    def spread(self, label: str, metric: str) -> float:
        """The standard deviation over seeds, with n - 1; NaN of one seed."""
        values = self.values(label, metric)
        return float(values.std(ddof=1)) if len(values) > 1 else math.nan

    def compare(self, first: str, second: str, metric: str = "accuracy") -> Comparison:
        """The difference of two variants' means, and its standard error (Welch's)."""
        squares = [self.spread(label, metric) ** 2 / len(self.seeds) for label in (first, second)]
        difference = self.mean(second, metric) - self.mean(first, metric)
        return Comparison(difference, math.sqrt(sum(squares)))

    def cell(self, label: str, metric: str) -> str:
        """Mean and spread as text; the spread is left out where there is none to speak of."""
        how = METRICS[metric]
        mean, spread = self.mean(label, metric), self.spread(label, metric)
        if not math.isfinite(mean):
            return how.missing
        if not math.isfinite(spread) or spread == 0:
            return how.write(mean) + how.unit
        return f"{how.write(mean)} ± {how.write(spread)}{how.unit}"

    def sentence(self, first: str, second: str) -> str:
        """By how much the accuracies of two variants differ, and the standard error of that."""
        found = self.compare(first, second)
        text = f"{second} against {first}: {100 * found.difference:+.2f}"
        if len(self.seeds) == 1:
            return f"{text} points of accuracy, of which one seed says little."
        text = f"{text} ± {100 * found.error:.2f} points of accuracy"
        if not found.clear:
            return f"{text}, which {len(self.seeds)} seeds cannot tell from chance."
        return f"{text}."

    # ---- showing and keeping it ----

    def plot(self) -> Figure:
        """The experiment's panels, side by side."""
        from convext.lab.experiment_charts import plot_results

        return plot_results(self)

    def __str__(self) -> str:
        from convext.lab.experiment_table import text

        return text(self)

    def __rich__(self):
        from convext.lab.experiment_table import table

        return table(self)

    def save(self, path: str | Path) -> None:
        """Writes all of it as JSON; a number that is not finite becomes null."""
        summary = {
            label: {
                metric: {"mean": self.mean(label, metric), "spread": self.spread(label, metric)}
                for metric in self.of(label)[0].figures
            }
            for label in self.trained
        }
        write_json(
            Path(path),
            {
                "experiment": self.experiment.name,
                "question": self.experiment.question,
                "claim": self.experiment.claim,
                "measured": self.experiment.measured(self),
                "settings": self.settings,
                "labels": list(self.labels),
                "refused": self.refused,
                "summary": summary,
                "runs": [run.to_json() for run in self.runs],
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Reads what `save` wrote of one of `convext lab`'s experiments.

        Raises:
            OSError, ValueError, KeyError: it is not there, or not written by `save`.
        """
        from convext.lab.experiments import EXPERIMENTS

        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["experiment"] not in EXPERIMENTS:
            raise ValueError(f"{path}: no experiment is called {found['experiment']!r}")
        return cls(
            experiment=EXPERIMENTS[found["experiment"]],
            settings=found["settings"],
            labels=tuple(found["labels"]),
            runs=tuple(map(Run.from_json, found["runs"])),
            refused=found["refused"],
        )


def run_experiment(
    experiment: Experiment,
    dataset: Dataset,
    *,
    seeds: int = 3,
    epochs: int | None = None,
    train_images: int | None = None,
    threads: int = 1,
    told: Callable[[Run], None] = lambda run: None,
) -> Results:
    """Trains every variant from every seed.

    All variants are trained from one seed, then all from the next: what slows the machine down for
    a while then slows all of them. From the same seed they start from the same weights, where their
    networks have the same shapes, and meet the images in the same order.

    Args:
        experiment: which one.
        dataset: as `load_data` gives it.
        seeds: how many, from 0.
        epochs: of each run; the data set's default if None.
        train_images: trains on the first so many only; all if None.
        threads: torch's, while it runs.
        told: is given each run when it is done.

    Raises:
        ValueError: a number out of its range.
    """
    for name, value in (("seeds", seeds), ("epochs", epochs), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if train_images is not None:
        if not 2 <= train_images <= len(dataset.train):
            raise ValueError(
                f"train_images must be from 2 to {len(dataset.train)}, got {train_images}"
            )
        images, labels = dataset.train.images, dataset.train.labels
        dataset = replace(dataset, train=Split(images[:train_images], labels[:train_images]))
    defaults = DEFAULTS[dataset.name]
    epochs = epochs or defaults["epochs"]
    normalize = dataset.train.statistics()
    variants = {
        label: replace(variant, network=replace(variant.network, normalize=normalize))
        for label, variant in experiment.variants(defaults["batch_size"], defaults["lr"]).items()
    }

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=()):
            runs, refused = _train_all(experiment, variants, dataset, epochs, seeds, told)
    finally:
        torch.set_num_threads(before)
    settings = {
        "data": dataset.name,
        "train_images": len(dataset.train),
        "valid_images": len(dataset.valid),
        "epochs": epochs,
        "seeds": seeds,
        "threads": threads,
        "batch_sizes": {label: variant.batch_size for label, variant in variants.items()},
        "versions": {
            "convext": convext.__version__,
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "python": platform.python_version(),
        },
    }
    return Results(experiment, settings, tuple(variants), tuple(runs), refused)


def _train_all(
    experiment: Experiment,
    variants: Mapping[str, Variant],
    dataset: Dataset,
    epochs: int,
    seeds: int,
    told: Callable[[Run], None],
) -> tuple[list[Run], dict[str, str]]:
    refused = {
        label: message
        for label, variant in variants.items()
        if variant.may_refuse and (message := refusal(variant, dataset)) is not None
    }
    trained = {label: variant for label, variant in variants.items() if label not in refused}
    label, variant = next(iter(trained.items()))
    few = 2 * variant.batch_size
    beginning = Split(dataset.train.images[:few], dataset.train.labels[:few])
    # A process's first run is slower than the others.
    run_variant(label, variant, replace(dataset, train=beginning), epochs=1, seed=0)

    runs = []
    for seed in range(seeds):
        for label, variant in trained.items():
            run = run_variant(
                label,
                variant,
                dataset,
                epochs=epochs,
                seed=seed,
                near_zero="near_zero" in experiment.metrics,
                histograms="color_dim" in experiment.panels,
                noise="noise_scale" in experiment.metrics,
            )
            runs.append(run)
            told(run)
    return [_without_picture(run, runs) for run in runs], refused


def _without_picture(run: Run, runs: list[Run]) -> Run:
    """The run without its histograms, unless it is its variant's worst: one picture is enough."""
    worst = min(
        (other for other in runs if other.variant == run.variant),
        key=lambda other: other.figures["accuracy"],
    )
    return run if run is worst else replace(run, activations=None)
