"""The file of `convext.autotune(cache=...)`.

JSON: {"convext.autotune": 1, "machines": {machine: {problem: {algorithm: seconds}}}}. A machine is
a CPU model and a version of convext; a problem's text names the threads and the instruction set.
"""

import json
import math
import os
import platform
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from convext import _C

Table = dict[str, dict[str, float]]
_FORMAT = 1


class TuningCache:
    """Times in memory (`times`) and in a file, which others may write too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times = _C.MeasuredTimes()
        self._written: Table = {}
        machines = self._read()
        if machines:
            self._written = machines.get(this_machine(), {})
            self.times.add(self._written)

    def write(self) -> None:
        """Add to the file what it lacks. A warning where that can't be."""
        table = self.times.table()
        if table == self._written:
            return
        self._written = table
        machines = self._read()
        if machines is None:
            return
        # Another process may write between our reading and replacing: it will measure again.
        machines[this_machine()] = {**machines.get(this_machine(), {}), **table}
        content = json.dumps({"convext.autotune": _FORMAT, "machines": machines}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, content)
        except OSError as error:
            self._warn(f"cannot be written: {error}")

    def _read(self) -> dict[str, Table] | None:
        """The file's machines; none where there is no file, None where it can't be used."""
        try:
            text = self.path.read_text(encoding="utf-8")
            return _parse(text) if text else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"is left alone: {error}")
            return None

    def _warn(self, what: str) -> None:
        warnings.warn(f"convext.autotune(): {self.path} {what}", stacklevel=2)


def _parse(text: str) -> dict[str, Table]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it holds no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("convext.autotune") != _FORMAT:
        raise ValueError(f'it does not begin with "convext.autotune": {_FORMAT}')
    machines = content.get("machines")
    if not _holds(machines, lambda table: _holds(table, lambda seconds: _holds(seconds, _is_time))):
        raise ValueError("its machines are not as convext writes them")
    return machines


def _holds(value: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(kind, value.values()))


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _replace(path: Path, content: str) -> None:
    """Whole or not at all, whoever reads or writes meanwhile."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def this_machine() -> str:
    """What times count for, besides what a problem's text names."""
    return f"{_cpu_model()}, convext {_C.build_info()['convext']}"


def _cpu_model() -> str:
    """As Linux on x86 calls it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
