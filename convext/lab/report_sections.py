"""The sections of a run's report: what its files hold, as HTML. Texts that never change are in
report.html.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import convext
from convext.bench import machine
from convext.inspection.show import LayerFilters
from convext.inspection.summary import LayerRow, Summary
from convext.lab import html_parts
from convext.lab.activation_stats import ActivationStats, LayerStats
from convext.lab.evaluation import Evaluation
from convext.lab.op_times import OpTimes
from convext.lab.recorder import Recorder
from convext.mnist.data import Dataset
from convext.mnist.learner import Learner
from convext.mnist.settings import Options, Settings, count

_DATA_NAMES = {"mnist": "MNIST", "digits": "scikit-learn's digits"}
_WORST = 24  # images shown
_SILENT = 0.9  # a layer with this share near zero is pointed at


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, and the data that it was on.

    Attributes:
        metrics: of metrics.json.
        settings, model: of the checkpoint; the model is in evaluation mode, on the CPU.
        recorder, stats: None where the run kept none.
        classes: their names; a label is a place among them.
    """

    folder: Path
    metrics: Mapping
    settings: Settings
    model: nn.Module
    recorder: Recorder | None
    stats: ActivationStats | None
    dataset: Dataset
    classes: tuple[str, ...]

    @property
    def quoted_folder(self) -> str:
        """For a command line."""
        return escape(shlex.quote(str(self.folder)))


def data_name(run: Run) -> str:
    """For people."""
    name = run.dataset.name
    return Path(name).name if run.dataset.content else _DATA_NAMES.get(name, name)


def notices(run: Run) -> str:
    """What one should know before all else: that the run is not finished, or that it diverged."""
    found = []
    done = len(run.metrics["history"])
    if done < run.settings.epochs:
        found.append(
            f"The run is not finished: {done} of {count(run.settings.epochs, 'epoch')}. "
            f"<code>convext train --resume {run.quoted_folder}</code> goes on with it."
        )
    if run.metrics["valid_loss"] is None:
        found.append(
            "The run diverged: its loss is no longer a finite number. The learning rate was too "
            "high, most likely: try a tenth of it."
        )
    return "".join(f'<p class="notice">{text}</p>' for text in found)


def tiles(run: Run, evaluation: Evaluation) -> str:
    """The figures that one looks for first."""
    right, images = evaluation.correct, len(evaluation.labels)
    figures = [
        (percent(run.metrics["accuracy"]), f"accuracy, {right:,} of {images:,}"),
        (_loss(run.metrics["valid_loss"]), "validation loss"),
        (f"{run.metrics['train_seconds']:.1f} s", "training steps, all together"),
        (f"{run.metrics['parameters']:,}", "parameters learned"),
    ]
    return "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in figures)


def what_was_run(run: Run) -> str:
    """Data, layers, settings and versions."""
    settings, data = run.settings, run.dataset
    layers = "torch's stock layers"
    if settings.layers == "convext":
        layers = f"convext's, algorithm {settings.algorithm}"
    spread = f" in {count(settings.devices, 'process')}" if settings.devices > 1 else ""
    images = f"{len(data.train):,} images to train on, {len(data.valid):,} to validate with"
    return html_parts.facts(
        [
            ("data", f"{data_name(run)}: {images} ({data.source})"),
            ("layers", layers),
            (
                "training",
                f"{count(settings.epochs, 'epoch')} of batches of {settings.batch_size}, AdamW, "
                f"1cycle up to a learning rate of {settings.lr:g}, seed {settings.seed}"
                + (", each image moved a little at random" if settings.augment else ""),
            ),
            ("device", f"{settings.device}, {count(settings.threads, 'thread')}{spread}"),
            ("versions", ", ".join(" ".join(item) for item in run.metrics["versions"].items())),
        ]
    )


def epochs(run: Run) -> str:
    """A row for each."""
    rows = [
        [
            str(row["epoch"]),
            percent(row["accuracy"]),
            _loss(row["valid_loss"]),
            _loss(row["train_loss"]),
            f"{row['train_seconds']:.2f} s",
        ]
        for row in run.metrics["history"]
    ]
    head = ["epoch", "accuracy", "validation loss", "training loss", "time"]
    return html_parts.table(head, rows, texts=())


def network(described: Summary) -> str:
    """The summary, as a table."""
    rows = [
        [row.name, row.type, _sizes(row.output_shape), *map(_amount, _amounts(row))]
        for row in described.rows
    ]
    totals = [sum(column) for column in zip(*map(_amounts, described.rows), strict=True)]
    head = ["layer", "type", "output", "weights", "biases", "parameters", "multiplications"]
    foot = ["all layers", "", "", *map(_amount, totals)]
    return html_parts.table(head, rows, foot, texts=(0, 1, 2))


def loss_chart(run: Run) -> str:
    """Of every batch."""
    if run.recorder is None:
        return _missing("The run kept no record of its batches.")
    losses = [loss for loss in run.recorder.batches["loss"] if loss is not None]
    ends = f", from {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""
    text = f"Loss of {count(len(run.recorder), 'batch')}{ends}; validation loss after each epoch"
    return html_parts.drawing(run.recorder.plot_loss(), "loss", text)


def schedule_chart(run: Run) -> str:
    """Learning rate and momentum of every batch."""
    if run.recorder is None:
        return _missing("The run kept no record of its batches.")
    rates = run.recorder.batches["lr"]
    text = f"Learning rate, from {rates[0]:.3g} up to {max(rates):.3g} and down to {rates[-1]:.3g}"
    return html_parts.drawing(run.recorder.plot_sched(), "schedule", f"{text}; and momentum")


def layers(run: Run) -> str:
    """The statistics of each layer, as numbers, curves and histograms over time."""
    stats = run.stats
    if stats is None:
        return _missing(
            "The run collected no statistics of activations: it was told --stats off. With "
            "--stats histograms, the default, they are here, batch by batch."
        )
    found = {name: stats.layer(name) for name in stats.layers}
    silent = [
        f"{name} ({layer.near_zero[-1]:.0%})"
        for name, layer in found.items()
        if layer.near_zero[-1] > _SILENT
    ]
    looked_at = "" if stats.stride == 1 else f"; one batch in {stats.stride} was looked at"
    head = ["layer", "mean", "standard deviation", f"share with |x| ≤ {stats.near_zero:g}"]
    parts = [
        "<p>Activations are what a layer puts out, here each activation function, while it trains"
        f"{looked_at}. From the first batch to the last:</p>",
        html_parts.table(head, [[name, *_ends(layer)] for name, layer in found.items()]),
        "<p>Healthy layers have a mean and a standard deviation that settle soon, and that are of "
        "the same order in all layers, neither fading away from one to the next nor growing. A "
        "ReLU sets about half of its numbers to 0. What is near zero tells the next layer nothing, "
        f"so that a layer with more than {_SILENT:.0%} of its numbers there is mostly silent: "
        f"here {escape(' and '.join(silent)) or 'none'}.</p>",
    ]
    if stats.bins:
        parts.append(
            "<p>In the coloured pictures each column is one batch: the histogram of its "
            "activations, stood on end, with 0 at the bottom; the brighter a colour, the more "
            f"numbers. Those beyond {stats.range[1]:g} are not shown. A healthy layer has, from "
            "the first batches on, a band that reaches up evenly and fades smoothly. It is a bad "
            "sign when the band climbs and then falls to a bright line at 0, perhaps again and "
            "again: activations grew and collapsed, as they do when the learning rate is too "
            "high, and what was learned until then is lost. A bright line at the bottom and "
            "nothing above it is a layer that has died.</p>"
        )
    else:
        parts.append(_missing("The run counted no histograms: it was told --stats numbers."))
    for name, layer in found.items():
        trend = f"of {name} over {count(len(layer.batches), 'batch')}"
        parts.append(f"<h3>{escape(name)}</h3>")
        curves = stats.plot_layer_stats(name)
        curves.suptitle("")  # the heading says it
        text = f"Mean, standard deviation and share near zero {trend}"
        parts.append(html_parts.drawing(curves, f"stats-{name}", text))
        if stats.bins:
            histograms = stats.color_dim(name)
            histograms.axes[0].set_title("")
            text = f"Histograms of the activations {trend}"
            parts.append(html_parts.drawing(histograms, f"dim-{name}", text))
    return "".join(parts)


def _ends(layer: LayerStats) -> list[str]:
    """Of each statistic, the first and the last."""
    numbers = [f"{_figure(of[0])} → {_figure(of[-1])}" for of in (layer.mean, layer.std)]
    return [*numbers, f"{layer.near_zero[0]:.0%} → {layer.near_zero[-1]:.0%}"]


def confused(counts: Tensor, names: Sequence[str]) -> str:
    """The most frequent mistakes, in words."""
    mistakes = counts - counts.diag().diag()
    total = int(mistakes.sum())
    if not total:
        return "There is no mistake."
    most = mistakes.flatten().argsort(descending=True, stable=True)[:3].tolist()
    pairs = [(*divmod(place, len(names)), int(mistakes.flatten()[place])) for place in most]
    texts = [f"{names[a]} taken for {names[b]} ({n})" for a, b, n in pairs if n]
    return escape(f"{count(total, 'mistake')} in all. The most frequent: {', '.join(texts)}.")


def worst(run: Run, evaluation: Evaluation) -> str:
    """The images with the highest loss, with what they are and what they were taken for."""
    items = []
    for place in evaluation.worst(_WORST).tolist():
        true, guess = (int(of[place]) for of in (evaluation.labels, evaluation.predictions))
        name, taken_for = run.classes[true], run.classes[guess]
        chances = [(k, float(evaluation.probabilities[place, k])) for k in {guess: 0, true: 0}]
        given = "; ".join(f"{run.classes[k]}: {_chance(chance)}" for k, chance in chances)
        if not math.isfinite(chances[0][1]):
            says, given = f"{name}, no prediction", "scores not finite"
        elif guess == true:
            says = f"{name}, right but unsure"
        else:
            says = f"{name}, taken for {taken_for}"
        image = html_parts.picture(
            run.dataset.valid.images[place],
            f"Validation image {place}: {says}",
            ink=run.dataset.content is None,
        )
        loss = _figure(float(evaluation.losses[place]))
        items.append(
            f'<li data-image="{place}">{image}<b>{escape(says)}</b><span>{escape(given)}<br>'
            f"loss {loss}<br>image {place}</span></li>"
        )
    return f'<ol class="pictures">{"".join(items)}</ol>'


def filters(shown: LayerFilters) -> str:
    """The first layer's, as squares."""
    outputs, *kernel = shown.weight.shape
    low, high = float(shown.weight.min()), float(shown.weight.max())
    text = (
        f"{shown.layer} has {outputs} filters of {_sizes(kernel)} weights, from {_figure(low)} "
        f"to {_figure(high)}"
    )
    return f"<p>{escape(text)}.</p>" + html_parts.drawing(shown.plot(), "filters", text)


def times(run: Run, found: OpTimes) -> str:
    """A training step's, by kinds of work."""
    text = (
        f"A training step of {count(found.batch, 'image')} took {1000 * found.total:.1f} ms: the "
        f"median of {found.steps} steps that were made for this report, on the CPU "
        f"({machine.cpu_name()}) with {count(found.threads, 'thread')}, under torch.profiler, "
        "which itself takes a little for each operation."
    )
    if run.settings.device != "cpu":
        text += " The run was on another device, where the shares are others."
    if run.settings.devices > 1:
        text += " One process had the whole batch, which in the run several shared."
    if run.settings.augment:
        text += " Moving the images at random is not in it."
    rows = [
        (kind, seconds / found.total, f"{1000 * seconds:.2f} ms")
        for kind, seconds in found.seconds.items()
    ]
    return f"<p>{escape(text)}</p>{html_parts.bars(rows)}"


def again(run: Run) -> str:
    """The command line, and what tells whether the same came of it."""
    text = f"<pre>{escape(command(run.settings))}</pre>"
    if not _is_straight(run):
        text += _missing(
            "This run was resumed with another number of epochs, which changed its schedule on "
            "the way: the command trains as long, but not along the same path."
        )
    data = [t for s in (run.dataset.train, run.dataset.valid) for t in (s.images, s.labels)]
    return text + html_parts.facts(
        [
            ("data", f"SHA-256 {fingerprint(data)}"),
            ("weights", f"SHA-256 {fingerprint(run.model.state_dict().values())}"),
            *run.metrics["versions"].items(),
            (
                "processor",
                f"{machine.cpu_name()}, {convext.build_info()['cpu_isa']} (this report's)",
            ),
        ]
    )


def command(settings: Settings) -> str:
    """The command line of a run, with every setting in it, so that no default can change it."""
    lines = ["convext train"]
    chosen = {k: v for k, v in vars(settings).items() if k in Options.__dataclass_fields__}
    if settings.content is None:  # what only a folder of pictures has
        del chosen["image_size"], chosen["colour"]
    for name, value in chosen.items():
        option = name.replace("_", "-")
        if value is True or (value is False and name == "colour"):
            word = f"--{option}" if value else f"--no-{option}"
        elif value is None or value is False:
            continue
        else:
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            word = f"--{option} {shlex.quote(text)}"
        if len(lines[-1]) + len(word) > 76:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors' numbers, one after the other, as hexadecimal digits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _is_straight(run: Run) -> bool:
    """Whether the rates are those of one run from beginning to end, as far as there is a record."""
    if run.recorder is None:
        return True
    rates = run.recorder.batches["lr"]
    steps = max(1, len(run.dataset.train) // run.settings.batch_size) * run.settings.epochs
    if len(rates) > steps:
        return False
    learner = Learner(nn.Linear(1, 1), run.settings.lr, total_steps=steps)
    schedule = learner.configure_optimizers()["lr_scheduler"]["scheduler"]
    expected = [schedule.get_last_lr()[0]]
    schedule.optimizer.step()  # which the schedule waits for
    while len(expected) < len(rates):
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    return bool(np.allclose(rates, expected, rtol=1e-6))


def percent(share: float) -> str:
    """As in `convext train`."""
    return f"{share:.2%}"


def _amounts(row: LayerRow) -> tuple[int, ...]:
    return row.weights, row.biases, row.parameters, row.multiplications


def _amount(number: int) -> str:
    return f"{number:,}" if number else ""


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _chance(share: float) -> str:
    return "< 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _figure(value: float) -> str:
    """Three digits; thousands as they are."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _missing(text: str) -> str:
    return f'<p class="notice">{escape(text)}</p>'
