"""The processes that train together, the first of which leads.

`started` starts the others on this machine, `joined` takes part in those that torchrun started.
Either way they are torch.distributed's default process group, over gloo and, for what is on GPUs,
NCCL. Only the leader looks at
options, files and the terminal. The others get the job from it and are silent: where one fails,
the leader says why.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from convext.errors import ProcessError, UserError

Shared = TypeVar("Shared")

_FAILURE = "failure"  # the store's key for what the first follower to fail has to say


@dataclass(frozen=True)
class World:
    """This process among all: its rank of `size`, and its local rank of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Shared | None = None) -> Shared:
        """Gives the leader's value to everyone, and returns it. All must call."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


def under_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined() -> Iterator[World]:
    """Within the block, this is one of torchrun's processes.

    Raises:
        ProcessError: in the leader, where another process failed. That one exits silently.
    """
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(os.environ[name]) for name in variables))
    if not world.leads:
        # To die of Ctrl-C at once, even within a collective, and without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    store, *_ = next(dist.rendezvous("env://"))
    with _group(world, store):
        yield world


@contextmanager
def started(size: int, follow: Callable[[World], None]) -> Iterator[World]:
    """Within the block, this is the leader of `size` processes; the others call `follow`.

    At the end of the block the others are ended, whatever they do.

    Args:
        size: processes, at least 1.
        follow: a function of a module, since the others import it by name.

    Raises:
        ProcessError: another process failed.
    """
    if size == 1:
        yield World()
        return
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UserError(f"--devices {size}: this PyTorch was built without torch.distributed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "store")
        processes = _start(size, path, follow)
        try:
            world = World(0, size, 0, size)
            store = dist.FileStore(path, size)
            _await_ready(store, processes)
            with _group(world, store, processes):
                yield world
        finally:
            for process in processes:
                process.kill()  # anything milder waits for the collective it is in
                process.join()


def _start(size: int, path: str, follow: Callable[[World], None]) -> list[BaseProcess]:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_follower, args=(World(rank, size, rank, size), path, follow), daemon=True
        )
        for rank in range(1, size)
    ]
    with _interrupts_ignored():
        for process in processes:
            process.start()
    return processes


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which a terminal sends to all: one answers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _await_ready(store: dist.Store, processes: Sequence[BaseProcess]) -> None:
    """Waits in Python, where Ctrl-C is heard and a process that died is noticed."""
    keys = [_ready(rank) for rank in range(1, len(processes) + 1)]
    sentinels = [process.sentinel for process in processes]
    while not store.check(keys):
        if connection.wait(sentinels, timeout=0.02):
            raise ProcessError(_failure(store, processes) or "another process ended early")


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _follower(world: World, path: str, follow: Callable[[World], None]) -> None:
    """What a started process runs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = dist.FileStore(path, world.size)
    store.set(_ready(world.rank), "")
    with _group(world, store):
        follow(world)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _group(
    world: World, store: dist.Store, processes: Sequence[BaseProcess] = ()
) -> Iterator[None]:
    """Within the block the process group exists.

    When one process fails its connections close, so that the collectives of all others fail too.
    Hence what a follower has to say goes to the store, from where the leader takes the cause.
    """
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if with_gpus else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
    )
    try:
        yield
    except Exception as error:
        if world.leads:
            cause = _failure(store, processes)
            if cause is None or isinstance(error, UserError):
                raise
            raise ProcessError(cause) from None
        trace = traceback.format_exc().rstrip()
        store.compare_set(_FAILURE, "", f"process {world.rank} of {world.size} failed:\n{trace}")
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def _failure(store: dist.Store, processes: Sequence[BaseProcess]) -> str | None:
    """Why another process failed, if one did."""
    if store.check([_FAILURE]):
        return store.get(_FAILURE).decode()
    # The connections of a process that dies close a little before it can be waited for.
    ended = connection.wait([process.sentinel for process in processes], timeout=1)
    for rank, process in enumerate(processes, start=1):
        if process.sentinel in ended:
            process.join(1)
        if process.exitcode:
            how = f"with status {process.exitcode}"
            if process.exitcode < 0:
                how = f"by {signal.Signals(-process.exitcode).name}"
            return f"process {rank} of {len(processes) + 1} was ended {how}"
    return None
