"""Build backend: setuptools', but against the torch of the environment that is installed into.

pip builds in an isolated environment. An extension compiled there against a freshly downloaded
torch would not load beside the user's own. So the interpreter is asked, outside the isolation,
which torch it has, and that one is appended to sys.path; torch becomes a build requirement only
where there is none. Without isolation (`--no-build-isolation`) torch is simply importable.

Front ends that build in an environment with an interpreter of its own (uv, `python -m build`)
hide the user's torch for good: use their `--no-build-isolation` / `--no-isolation`.
"""

import importlib.util
import json
import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks for the front end; no torch needed)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MIN_TORCH = (2, 11)  # as in pyproject.toml's dependencies

_ASK = """
import importlib.metadata, json, sys
print(json.dumps({"torch": importlib.metadata.version("torch"), "path": sys.path}))
"""


def _users_torch() -> dict | None:
    """Version of the interpreter's own torch, and the path it is found on; None without torch."""
    # The isolation is made of environment variables; the interpreter is the user's.
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in isolation}
    answer = subprocess.run(
        [sys.executable, "-c", _ASK], env=env, cwd=os.path.sep, capture_output=True, text=True
    )
    found = json.loads(answer.stdout) if answer.returncode == 0 else None
    # An older torch is none: pip is about to replace it with one that convext can use.
    return found if found and _release(found["torch"]) >= MIN_TORCH else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _make_torch_importable() -> None:
    if importlib.util.find_spec("torch"):
        return
    found = _users_torch()
    if found is None:
        return  # setup.py says what is missing
    # At the end: what the isolated environment has (setuptools, ninja) goes first.
    sys.path += [folder for folder in found["path"] if folder and folder not in sys.path]
    print(f"convext: building against the environment's torch {found['torch']}")


def get_requires_for_build_wheel(config_settings=None):
    has_torch = importlib.util.find_spec("torch") or _users_torch()
    return ["ninja"] if has_torch else ["ninja", "torch>=" + ".".join(map(str, MIN_TORCH))]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
