"""One run of training, from options to metrics.json: what `convext train` does."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn

import convext
from convext.errors import UserError
from convext.inspection.summary import Summary, summary
from convext.lab.activation_stats import ActivationStats
from convext.lab.callbacks import CollectActivations, RecordRun
from convext.lab.recorder import Recorder
from convext.mnist import processes
from convext.mnist.augment import Augmentation
from convext.mnist.callbacks import (
    DefaultSigterm,
    EpochTable,
    InterruptError,
    ProgressBar,
    SaveRun,
    interruptible,
)
from convext.mnist.data import Dataset
from convext.mnist.ddp import trainer_arguments
from convext.mnist.learner import Learner
from convext.mnist.loader import BatchLoader, first
from convext.mnist.processes import World
from convext.mnist.quiet import QuietLightning
from convext.mnist.run_folder import (
    ACTIVATIONS,
    METRICS,
    REPORT,
    load_checkpoint,
    new_run_folder,
    remove_leftovers,
    writable_folder,
    write_json,
)
from convext.mnist.settings import (
    Options,
    Settings,
    check_options,
    choose_device,
    count,
    make_settings,
    read_data,
)
from convext.sync_batch_norm import SyncBatchNorm2d

VALID_BATCH = 1000  # images at once in validation; a constant, since it changes no result


@dataclass(frozen=True)
class Job:
    """What a process needs to know to take part in a run.

    Attributes:
        checkpoint: where to go on from, if anywhere.
        report: whether the first process writes one at the end.
    """

    settings: Settings
    dataset: Dataset
    folder: Path
    checkpoint: Path | None
    report: bool


def train(options: Options, console: Console | None = None) -> dict | None:
    """Trains as the options say, showing what happens on the console.

    With several processes this one starts the others, which import the main module anew: a script
    that calls this function needs its `if __name__ == "__main__"`. Those that torchrun starts call
    this function all.

    Returns:
        What metrics.json holds; None in torchrun's processes other than the first.

    Raises:
        UserError: an option, a file or a folder that won't do, or another process that failed.
        KeyboardInterrupt: Ctrl-C, with a message that says what was kept.
    """
    console = console or Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not processes.under_torchrun():
        job = _prepare(options)
        with processes.started(job.settings.devices, _follow) as world:
            return _lead(world, job, console)
    with processes.joined() as world:
        if world.leads:
            return _lead(world, _prepare(options, world), console)
        _follow(world)
        return None


def _prepare(options: Options, world: World | None = None) -> Job:
    """Looks at the options, reads the data and makes the folder."""
    if world is not None:
        if options.devices not in (None, world.size):
            raise UserError(
                f"--devices {options.devices}: torchrun started {count(world.size, 'process')}"
            )
        options = replace(options, devices=world.size)
        if options.threads is None and options.resume is None:
            options = replace(options, threads=torch.get_num_threads() * world.local_size)
    local_size = world.local_size if world else options.devices or 1
    options = replace(options, device=choose_device(options.device, options.layers, local_size))
    check_options(options)
    path, checkpoint = load_checkpoint(options.resume) if options.resume else (None, None)
    dataset = read_data(options, checkpoint)
    settings = make_settings(options, dataset, checkpoint)
    if path is None:
        folder = new_run_folder(options.out, f"{Path(settings.data).name}-{settings.layers}")
    else:
        folder = writable_folder(Path(options.out).expanduser() if options.out else path.parent)
    return Job(settings, dataset, folder, path, options.report)


def _lead(world: World, job: Job, console: Console) -> dict:
    """Trains with the other processes, if any; shows what happens, and writes the metrics."""
    settings, folder = world.share(job).settings, job.folder
    image = job.dataset.train.images.shape[1:]
    model = settings.make_model().to(settings.device)
    described = summary(model, (1, *image))
    learner, batches = _build(world, job)
    resumed = load_checkpoint(job.checkpoint)[1] if job.checkpoint else None
    _announce(console, settings, job.dataset, described, batches, resumed)
    remove_leftovers(folder)

    recorder, stats = Recorder(), _activation_stats(settings, learner.model)

    def write_results() -> dict:
        metrics = _metrics(settings, described, learner.history)
        write_json(folder / METRICS, metrics)
        recorder.save(folder)
        if stats is not None:
            stats.save(folder / ACTIVATIONS)
        return metrics

    with interruptible() as interrupt:
        save = SaveRun(
            folder, asdict(settings), settings.save_every, interrupt=interrupt, after=write_results
        )
        callbacks = [
            ProgressBar(console),
            RecordRun(recorder),
            *([] if stats is None else [CollectActivations(stats)]),
            save,  # before the table: an epoch's line says that the epoch is kept
            EpochTable(console),
        ]
        try:
            _fit(world, job, learner, batches, callbacks)
        except (InterruptError, Exception) as error:
            # The others may have died of the same Ctrl-C, which this one then sees as an error.
            if interrupt.came or isinstance(error, InterruptError):
                raise KeyboardInterrupt(_kept(folder)) from None
            raise
    metrics = write_results()  # again, for a run that had nothing left to train
    if resumed and len(resumed["history"]) == settings.epochs:
        console.print(f"Nothing left to train: {count(settings.epochs, 'epoch')} done already")
    console.print(f"\n{folder}/last.ckpt: to go on from, with --resume {folder} --epochs N")
    console.print(f"{folder}/{METRICS}: these figures, for programs")
    if job.report and _wrote_report(job):
        console.print(f"{folder}/{REPORT}: all of it, for people")
    return metrics


def _wrote_report(job: Job) -> bool:
    """Writes it; where that fails, says so on stderr, for the run itself is kept already."""
    try:
        from convext.lab.report import write_report

        write_report(job.folder, job.dataset)
    except Exception as error:  # whatever it is, the figures must be returned
        reason = str(error).partition("\n")[0] or type(error).__name__
        again = f"convext report {job.folder}"
        print(f"convext train: no {REPORT}: {reason} (try again: {again})", file=sys.stderr)
        return False
    return True


def _activation_stats(settings: Settings, model: nn.Module) -> ActivationStats | None:
    """Of the first process's part of each batch, where there are several."""
    if settings.stats == "off":
        return None
    return ActivationStats(model, histograms=settings.stats == "histograms")


def _follow(world: World) -> None:
    """Trains with the leader and is silent."""
    job: Job = world.share()
    callbacks = [SaveRun(job.folder, asdict(job.settings), job.settings.save_every)]
    _fit(world, job, *_build(world, job), callbacks)


def _build(world: World, job: Job) -> tuple[Learner, BatchLoader]:
    """The learner, and this process's part of the batches that it learns from."""
    settings, train = job.settings, job.dataset.train
    torch.set_num_threads(max(1, settings.threads // world.local_size))
    torch.manual_seed(settings.seed)
    model = settings.make_model()
    if world.size > 1 and settings.layers == "convext":
        SyncBatchNorm2d.convert_sync_batchnorm(model)
    device = _own_device(world, settings)
    batches = BatchLoader(
        train.images.to(device),
        train.labels.to(device),
        settings.batch_size,
        seed=settings.seed,
        drop_last=True,
        part=world.rank,
        parts=world.size,
        augment=Augmentation() if settings.augment else None,
    )
    return Learner(model, settings.lr, total_steps=settings.epochs * len(batches)), batches


def _own_device(world: World, settings: Settings) -> torch.device:
    """Of this process, which holds all of the data there: no step waits for a copy."""
    if settings.device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def _fit(
    world: World, job: Job, learner: Learner, batches: BatchLoader, callbacks: list[pl.Callback]
) -> None:
    valid, device = job.dataset.valid, batches.images.device
    validation = BatchLoader(
        valid.images.to(device),
        valid.labels.to(device),
        VALID_BATCH,
        part=world.rank,
        parts=world.size,
    )
    if world.size > 1:
        callbacks = [*callbacks, DefaultSigterm()]
    fit(
        learner,
        batches,
        validation,
        epochs=job.settings.epochs,
        device=job.settings.device,
        callbacks=callbacks,
        checkpoint=job.checkpoint,
        default_root_dir=job.folder,
        **trainer_arguments(world),
    )


def fit(
    learner: Learner,
    batches: BatchLoader,
    validation: BatchLoader,
    *,
    epochs: int,
    device: str = "cpu",
    callbacks: Sequence[pl.Callback] = (),
    checkpoint: Path | None = None,
    **options: object,
) -> None:
    """Lets Lightning train, and show and write nothing but what the callbacks do.

    Args:
        batches, validation: on the device already.
        checkpoint: where to go on from, if anywhere.
        options: for Lightning's Trainer, besides.
    """
    with QuietLightning():
        trainer = pl.Trainer(
            accelerator=device,
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,  # SaveRun does it
            enable_progress_bar=False,  # ProgressBar does it
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        trainer.fit(learner, batches, validation, ckpt_path=checkpoint, weights_only=True)


def _announce(
    console: Console,
    settings: Settings,
    dataset: Dataset,
    described: Summary,
    batches: BatchLoader,
    resumed: dict | None,
) -> None:
    if dataset.note:
        console.print(dataset.note)
    kind = f"convext, algorithm {settings.algorithm}"
    console.print(
        f"data      {dataset.name}: {len(dataset.train):,} images to train on, "
        f"{len(dataset.valid):,} to validate with ({dataset.source})"
    )
    if dataset.content is not None:
        console.print(f"classes   {', '.join(dataset.classes)}")
    images, _ = first(batches)
    sizes = ", ".join(f"{n} {size}" for n, size in zip("NCHW", images.shape, strict=True))
    console.print(f"batch     {sizes}{' in each process' if batches.parts > 1 else ''}")
    if batches.augment is not None:
        console.print(
            f"augment   each image turned by up to {batches.augment.degrees:g} degrees and "
            f"shifted by up to {batches.augment.pixels:g} pixels, anew in every epoch"
        )
    console.print(f"layers    {kind if settings.layers == 'convext' else 'torch, the stock ones'}")
    if settings.device == "cuda":
        console.print(f"device    {torch.cuda.get_device_name()}")
    console.print(
        f"training  {count(settings.epochs, 'epoch')} of {len(batches)} batches of "
        f"{batches.batch_size}, learning rate up to {settings.lr:g}, seed {settings.seed}, "
        f"{count(settings.threads, 'thread')}"
    )
    if resumed:
        console.print(f"resumed   after {count(resumed['global_step'], 'step')}")
    if settings.devices > 1:
        images = batches.batch_size // settings.devices
        shared = settings.layers == "convext"
        console.print(
            f"processes {settings.devices}, each with {count(images, 'image')} of every batch; "
            f"batch norm over {'all of them' if shared else 'its own (stock layers on a CPU)'}"
        )
    console.print()
    console.print(described if console.is_terminal else f"{described}\n")


def _metrics(settings: Settings, described: Summary, history: list[dict]) -> dict:
    last = history[-1]
    return {
        "accuracy": last["accuracy"],
        "valid_loss": last["valid_loss"],
        # Of the steps alone: reading the data and validating are not in it.
        "train_seconds": sum(epoch["train_seconds"] for epoch in history),
        "parameters": described.parameters,
        **asdict(settings),
        "versions": {
            "convext": convext.__version__,
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "python": platform.python_version(),
        },
        "history": history,
    }


def _kept(folder: Path) -> str:
    """What an interrupted run leaves. The file is asked, for Ctrl-C may come at any moment."""
    try:
        path, checkpoint = load_checkpoint(folder)
    except UserError:
        return "Interrupted before the first step: nothing was kept"
    return f"Interrupted: {path} holds {_progress(checkpoint)}; go on with --resume {folder}"


def _progress(checkpoint: dict) -> str:
    """How far the run is that the checkpoint is of."""
    steps = checkpoint["lr_schedulers"][0]["total_steps"]
    return (
        f"{checkpoint['global_step']} of {count(steps, 'step')}, {len(checkpoint['history'])} of "
        f"{count(checkpoint['convext']['epochs'], 'epoch')}"
    )
