"""`convext.autotune()`: "auto" goes by measured times."""

import atexit
import os
import threading
from pathlib import Path

from convext import _C
from convext.tuning_cache import TuningCache


class AutotuneResults(dict[str, dict[str, float]]):
    """Seconds of each algorithm, by problem; printed as a table, fastest first."""

    def __str__(self) -> str:
        if not self:
            return "nothing measured"
        width = max(map(len, self))
        return "\n".join(
            f"{problem:{width}}  "
            + ", ".join(
                f"{name} {1e6 * time:,.1f} us"
                for name, time in sorted(seconds.items(), key=lambda item: item[1])
            )
            for problem, seconds in sorted(self.items())
        )


class autotune:  # noqa: N801, a function to its users, as torch.set_grad_enabled
    """Have "auto" measure, in this thread, and take the fastest algorithm; off by default.

    The first call of a problem (sizes, settings, pass, dtype, memory format, number of threads and
    instruction set) runs every algorithm that can do it, in turn, for a tenth of a second or,
    where that is longer, once each, and computes with the fastest; later calls take that one.
    Winograd's algorithms take part under `convext.allow_winograd()`.

    As a function it holds from here on; as a context manager it ends with the block::

        with convext.autotune() as tuner:
            train(model)  # the backward passes inside, too
        print(tuner.results)

    Outside it "auto" is as ever a function of the problem alone. Inside, the same inputs give the
    same bits as long as the choices are the same, for which a `cache` sees. Compiled code that runs
    inside is tuned like any other, but code to be compiled cannot call it. It measures on the CPU
    only: under it, "auto" on CUDA is an error.

    Args:
        mode: True turns it on, False off.
        cache: False remembers what was measured until the process ends. A path also reads it from
            this file, and writes it there when the block ends and when the process does; True is
            convext/autotune.json in the user's cache. Times count for the CPU model and version of
            convext that they were measured with; one file holds those of many. Processes may
            share it. A file that is something else is left alone, with a warning.
    """

    def __init__(self, mode: bool = True, *, cache: bool | str | os.PathLike[str] = False) -> None:
        self._cache = _cache(cache) if mode and cache else None
        self._times = self._cache.times if self._cache else _in_memory
        self._in_use = self._times if mode else None
        self._before = _C.exchange_autotuning(self._in_use)

    def __enter__(self) -> "autotune":
        _C.exchange_autotuning(self._in_use)
        return self

    def __exit__(self, *_: object) -> None:
        _C.exchange_autotuning(self._before)
        if self._cache:
            self._cache.write()

    @property
    def results(self) -> AutotuneResults:
        """What has been measured or read, for all problems so far."""
        return AutotuneResults(self._times.table())


_in_memory = _C.MeasuredTimes()
_caches: dict[Path, TuningCache] = {}
_caches_lock = threading.Lock()


def _cache(cache: bool | str | os.PathLike[str]) -> TuningCache:
    """The one of this path: what was measured with it counts for all who name it."""
    path = Path.cwd() / (_user_cache() if cache is True else Path(cache))
    with _caches_lock:
        if path not in _caches:
            _caches[path] = TuningCache(path)
        return _caches[path]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "convext/autotune.json")


@atexit.register
def _write_caches() -> None:
    for cache in _caches.values():
        cache.write()
