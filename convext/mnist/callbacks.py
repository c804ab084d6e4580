"""What a run shows and keeps while it trains; one job per callback."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convext.mnist.run_folder import CHECKPOINT, replacing


class ProgressBar(pl.Callback):
    """A bar for the epoch under way, redrawn ten times a second, not at every step.

    It vanishes when the epoch's line is printed, and never appears where the output is not a
    terminal.
    """

    REDRAW_SECONDS = 0.1

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # no thread beside the training ones
            disable=not console.is_terminal,
        )
        self._drawn = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        title = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._task = self._progress.add_task(title, total=trainer.num_training_batches)
        self._progress.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        now = time.monotonic()
        if now - self._drawn >= self.REDRAW_SECONDS:
            self._drawn = now
            self._progress.update(self._task, completed=batch_idx + 1, refresh=True)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._progress.stop()
        for task in self._progress.task_ids:
            self._progress.remove_task(task)


class EpochTable(pl.Callback):
    """One line per epoch, from the learner's history."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._print("epoch", "accuracy", "valid loss", "train loss", "time")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        row = module.history[-1]
        self._print(
            str(row["epoch"]),
            f"{row['accuracy']:.2%}",
            f"{row['valid_loss']:.4f}",
            f"{row['train_loss']:.4f}",
            f"{row['train_seconds']:.2f} s",
        )

    def _print(self, *cells: str) -> None:
        first, *others = cells
        line = f"{first:>5}" + "".join(f"{cell:>12}" for cell in others)
        self._console.print(line, highlight=False)


class SaveRun(pl.Callback):
    """Saves the checkpoint after each epoch, and then whatever `after` writes.

    Where several processes train together, each has this callback and the first one writes. The
    file is written beside the old one and renamed over it: whenever a run is killed, its
    folder holds one whole checkpoint.
    """

    def __init__(self, folder: Path, settings: dict, after: Callable[[], object]) -> None:
        self._path = folder / CHECKPOINT
        self._settings = settings
        self._after = after

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["convext"] = self._settings

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self._path)  # writes nothing, but Lightning waits for all
            return
        with replacing(self._path) as temporary:
            trainer.save_checkpoint(temporary)
        self._after()


class DefaultSigterm(pl.Callback):
    """Lets SIGTERM end this process at once, and with its connections all others.

    Lightning's handler would send to the others from within whatever is being sent, and can wait
    for ever.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class InterruptError(BaseException):
    """Ctrl-C, as an exception that Lightning passes on.

    For KeyboardInterrupt it prints a notice of its own and exits with status 1; an Exception it
    may take for a failure to send, and go on.
    """


class Interrupt:
    """Whether Ctrl-C came."""

    came = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within the block, Ctrl-C raises InterruptError (signals reach the main thread alone)."""
    state = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough; let the cleaning up finish
        state.came = True
        raise InterruptError

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)
