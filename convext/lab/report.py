"""The report of a run: RUN/report.html, one file for people, made from the run's files alone.

report.html and report.css beside this file are its template and its style; report_sections.py makes
what is different in each run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch

import convext
from convext.inspection.show import show_filters
from convext.inspection.summary import summary
from convext.lab import html_parts
from convext.lab import report_sections as sections
from convext.lab.activation_stats import ActivationStats
from convext.lab.evaluation import evaluate
from convext.lab.op_times import measure_op_times
from convext.lab.recorder import Recorder
from convext.lab.report_sections import Run
from convext.mnist.data import Dataset
from convext.mnist.learner import Learner
from convext.mnist.run_folder import (
    ACTIVATIONS,
    RECORD,
    REPORT,
    load_trained,
    read_metrics,
    replacing,
)

_CONTENTS = {
    "run": "what was run",
    "network": "the network",
    "training": "how it learned",
    "layers": "what its layers did",
    "mistakes": "where it is wrong",
    "filters": "what its first layer looks for",
    "time": "where the time goes",
    "again": "how to do it again",
}


def write_report(folder: str | Path, dataset: Dataset) -> Path:
    """Writes a run's report, report.html, into its folder.

    It shows what metrics.json, record.json and activations.npz hold, and what comes of the weights
    in last.ckpt on the validation images. The time of each kind of operation is measured now, on a
    copy of the model, with as many threads as a process of the run had. What the run did not
    record is said to be missing.

    Args:
        folder: the run's.
        dataset: the one that the run was on.

    Returns:
        The report's path.

    Raises:
        UserError: the folder holds no run of `convext train`.
        ValueError: the dataset is another one.
        OSError: the report can't be written.
    """
    folder = Path(folder).expanduser()
    run = _read(folder, dataset)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, run.settings.threads // run.settings.devices))
    try:
        with _quiet_matplotlib():
            page = _page(run)
    finally:
        torch.set_num_threads(threads)
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / REPORT


def _read(folder: Path, dataset: Dataset) -> Run:
    settings, model = load_trained(folder, option="RUN")
    metrics = read_metrics(folder, option="RUN")
    if settings.content is None and dataset.name != settings.data:
        raise ValueError(f"dataset must be the run's, {settings.data}, got {dataset.name}")
    if dataset.content != settings.content:  # of a folder, which may have moved
        raise ValueError(f"{dataset.name}: its pictures are not those that the run was on")
    record, activations = folder / RECORD, folder / ACTIVATIONS
    return Run(
        folder,
        metrics,
        settings,
        model,
        Recorder.load(folder) if record.exists() else None,
        ActivationStats.load(activations) if activations.exists() else None,
        dataset,
        settings.classes,
    )


def _page(run: Run) -> str:
    train, valid = run.dataset.train, run.dataset.valid
    evaluation = evaluate(run.model, valid.images, valid.labels)
    counts = evaluation.confusion()
    op_times = measure_op_times(
        run.model,
        train.images,
        train.labels,
        lambda model: Learner(model, run.settings.lr, 100).configure_optimizers()["optimizer"],
        batch=run.settings.batch_size,
    )
    return Template(_part("report.html")).substitute(
        title=escape(
            f"{sections.data_name(run)}: {sections.percent(run.metrics['accuracy'])} right"
        ),
        style=_part("report.css"),
        folder=escape(str(run.folder)),
        quoted_folder=run.quoted_folder,
        date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        version=escape(convext.__version__),
        notices=sections.notices(run),
        tiles=sections.tiles(run, evaluation),
        contents="".join(f'<a href="#{name}">{text}</a>' for name, text in _CONTENTS.items()),
        run=sections.what_was_run(run),
        valid_images=f"{len(valid):,}",
        epochs=sections.epochs(run),
        network=sections.network(summary(run.model, (1, *valid.images.shape[1:]))),
        classes=len(run.classes),
        guessing=f"{math.log(len(run.classes)):.2f}",
        loss=sections.loss_chart(run),
        schedule=sections.schedule_chart(run),
        layers=sections.layers(run),
        confusion=html_parts.confusion_table(counts, run.classes),
        confused=sections.confused(counts, run.classes),
        worst=sections.worst(run, evaluation),
        filters=sections.filters(show_filters(run.model)),
        time=sections.times(run, op_times),
        again=sections.again(run),
    )


def _part(name: str) -> str:
    return (files("convext.lab") / name).read_text(encoding="utf-8")


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Within the block it does not tell that it looks for fonts."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
