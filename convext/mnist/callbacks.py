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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from convext.mnist.learner import Learner
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
        self._task: TaskID | None = None  # of the epoch under way

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        if self._task is None:  # not when the epoch starts: a resumed one does not
            title = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._task = self._progress.add_task(title, total=trainer.num_training_batches)
            self._progress.start()
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
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


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
    """Saves the checkpoint before the first step, every so often and after each epoch.

    It must come after the callbacks whose state the checkpoint is to hold. A run that was killed
    goes on from its last checkpoint and comes to the bits that it would have come to. Ctrl-C saves
    the step just done and ends the run.

    After an epoch's last step nothing is saved until it has been validated: Lightning would
    resume beyond the validation.

    Where several processes train together, each has this callback and the first one decides and
    writes. The file is written beside the old one and renamed over it: whenever a run is killed,
    its folder holds one whole checkpoint.

    Args:
        folder: the run's.
        settings: of the run, which the checkpoint holds too.
        every: seconds between checkpoints within an epoch; infinity for none.
        interrupt: whether Ctrl-C came. A run without is not interrupted.
        after: called when the checkpoint of an epoch's end is there.
    """

    ASK = 10  # steps from one question to the first of several processes to the next

    def __init__(
        self,
        folder: Path,
        settings: dict,
        every: float,
        *,
        interrupt: Interrupt | None = None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self._path = folder / CHECKPOINT
        self._settings = settings
        self._every = every
        self._interrupt = interrupt or Interrupt()
        self._after = after
        self._saved = 0.0

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["convext"] = self._settings

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)  # for a resumed run, too, of which settings may be new
        self._interrupt.awaited = True

    def on_train_batch_end(self, trainer, module: Learner, outputs, batch, batch_idx: int) -> None:
        if batch_idx + 1 < trainer.num_training_batches and self._is_due(trainer):
            with module.paused():
                self._save(trainer)
            self._interrupt.obey()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)
        if trainer.is_global_zero:
            self._after()
        self._interrupt.obey()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._interrupt.awaited = False

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether to save after this step; the same in all processes."""
        due = self._interrupt.came or time.monotonic() - self._saved >= self._every
        if trainer.world_size == 1:
            return due
        return trainer.global_step % self.ASK == 0 and trainer.strategy.broadcast(due)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            with replacing(self._path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(self._path)  # writes nothing, but all have to call it
        self._saved = time.monotonic()


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
    """Whether Ctrl-C came.

    Attributes:
        came: it did.
        awaited: someone looks at `came` soon, and calls `obey` where the run can end. Otherwise,
            and when it comes again, it ends the run at once.
    """

    came = False
    awaited = False

    def obey(self) -> None:
        """Ends the run, if Ctrl-C came."""
        if self.came:
            raise InterruptError


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within the block, Ctrl-C raises InterruptError (signals reach the main thread alone)."""
    state = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def interrupt(number: int, frame: object) -> None:
        first, state.came = not state.came, True
        if first and state.awaited:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # let the cleaning up finish
        raise InterruptError

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)
