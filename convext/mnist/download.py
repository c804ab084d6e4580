"""Fetching the MNIST archives into the user's cache, from whichever mirror answers.

An offline machine must find out within seconds, since training then goes on with the
digits: all mirrors are asked at once, under one deadline, and a mirror that does not answer
is not tried again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import pooch
import requests

from convext.mnist.idx import DataError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://azureopendatastorage.blob.core.windows.net/mnist/",
)
PROBE_SECONDS = 5.0  # for any mirror to answer at all
STALL_SECONDS = 15.0  # without a byte, once a download has begun
LOCK_SECONDS = 300.0  # for another process that downloads the same files


def cache_folder() -> Path:
    """The folder of this user's cache where downloaded data sets are kept."""
    return Path(pooch.os_cache("convext"))


def download(archives: dict[str, str], folder: Path, mirrors: Sequence[str]) -> None:
    """Makes sure that `folder` holds every archive, downloading those it lacks.

    Each file is written under a temporary name, checked, and renamed, so that no reader ever
    meets half of one; a lock keeps two processes from fetching the same files.

    Args:
        archives: file name -> checksum, as pooch writes it ("md5:..." or "sha256:...").
        folder: where they go; made if need be.
        mirrors: addresses ending in "/", to each of which a file name is appended.

    Raises:
        DataError: no mirror answers, none has a file with the right checksum, or the folder
            can't be written.
    """
    # Pooch announces every file; here one line before the first is enough.
    pooch.get_logger().setLevel(logging.WARNING)
    if all(_is_good(folder / name, checksum) for name, checksum in archives.items()):
        return  # nothing to write, so that a read-only cache serves too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            missing = {n: s for n, s in archives.items() if not _is_good(folder / n, s)}
            if missing:
                answering = _answering(mirrors, next(iter(missing)))
                print(f"Downloading MNIST to {folder}", flush=True)
                _download(missing, folder, answering)
    except filelock.Timeout as error:
        raise DataError(f"{folder}: another process holds its lock, {error.lock_file}") from error
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error


def _is_good(path: Path, checksum: str) -> bool:
    kind, _, digest = checksum.partition(":")
    return path.is_file() and pooch.file_hash(str(path), alg=kind) == digest


def _download(archives: dict[str, str], folder: Path, mirrors: list[str]) -> None:
    downloader = pooch.HTTPDownloader(timeout=(PROBE_SECONDS, STALL_SECONDS), progressbar=False)
    reasons = []
    for name, checksum in archives.items():
        while mirrors:
            url = mirrors[0] + name
            try:
                pooch.retrieve(url, checksum, fname=name, path=folder, downloader=downloader)
                break
            except requests.RequestException as error:
                reasons.append(f"{url}: {type(error).__name__}")
            except ValueError:  # pooch's word for it
                reasons.append(f"{url}: wrong checksum")
            del mirrors[0]
        else:
            raise DataError(f"no mirror serves MNIST ({'; '.join(reasons)})")


def _answering(mirrors: Sequence[str], name: str) -> list[str]:
    """Returns the mirrors that have the file, the quickest first.

    Every mirror is asked in a thread of its own: name lookups and unreachable addresses can
    each block for longer than any timeout that an HTTP client offers.
    """
    answers: queue.Queue[str | None] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            reply = requests.head(mirror + name, timeout=PROBE_SECONDS, allow_redirects=True)
            answers.put(mirror if reply.ok else None)
        except requests.RequestException:
            answers.put(None)

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    deadline = time.monotonic() + PROBE_SECONDS
    found: list[str] = []
    for _ in mirrors:
        # Once one has answered, the others get half a second: they are only second choices.
        wait = min(0.5, deadline - time.monotonic()) if found else deadline - time.monotonic()
        try:
            mirror = answers.get(timeout=max(wait, 0.0))
        except queue.Empty:
            break
        if mirror is not None:
            found.append(mirror)
    if not found:
        raise DataError(f"no network, or no MNIST mirror answers ({len(mirrors)} tried)")
    return found
