"""All there is to see on a GPU, in ten minutes and without a network (`make gpu-report`).

Builds in place with the torch and nvcc that are there, runs the tests of CUDA, trains, measures
beside cuDNN, and has compute-sanitizer look on. A stage that fails or takes too long is said so and
the next one runs. Leaves report.md, report.json and log.txt in a folder. Where the package is built
already, `--only machine tests train bench sanitizer` saves the time of that.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ("float32", "tf32", "bfloat16")
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass
class Stage:
    """A command, what it was allowed, and what came of it."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    status: int | None = None  # None until it has ended by itself
    seconds: float = 0.0
    output: str = ""

    def run(self, limit: float) -> None:
        """Run it for `limit` seconds at most; then it is interrupted, so that it can tidy up."""
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                list(map(str, self.command)),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self.output = str(error)
            return
        for what in (None, signal.SIGINT, signal.SIGKILL):
            try:
                if what is not None:
                    os.killpg(process.pid, what)
                self.output, _ = process.communicate(timeout=limit if what is None else 15)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            self.output, _ = process.communicate()
        self.seconds = time.monotonic() - start
        if what is None:
            self.status = process.returncode

    @property
    def result(self) -> str:
        """In a word or two."""
        if self.status is None:
            return f"no end in {self.seconds:.0f} s" if self.seconds else "did not start"
        return "passed" if self.status == 0 else f"failed ({self.status})"

    @property
    def summary(self) -> str:
        """The line that says most: pytest's or the sanitizer's last, or the last there is."""
        lines = [line.strip(" =") for line in self.output.splitlines() if line.strip(" =")]
        telling = [line for line in lines if re.search(r"\d+ passed|ERROR SUMMARY|RACECHECK", line)]
        return (telling or lines or [""])[-1][:160]


def stages(folder: Path, data_dir: str | None) -> list[Stage]:
    """In the order of what one would miss most."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    spread = ["-n", str(min(12, os.cpu_count() or 1))] if _has("xdist") else []
    train = [*python, "-m", "convext", "train", "--device", "cuda", "--epochs", "1"]
    train += ["--no-report"]  # which may need what is not installed here
    train += ["--data-dir", data_dir] if data_dir else []
    bench = [*python, "-m", "convext", "bench", "--device", "cuda", "--groups"]
    bench += ["mnist", "resnet50", "mobilenet", "batchnorm", "block", "step", "--batch", "64"]
    made = [
        Stage("machine", [*python, "-c", MACHINE], 60),
        Stage(
            "build",
            [*python, "setup.py", "--quiet", "build_ext", "--inplace"],
            270,
            {"CONVEXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _arch()},
        ),
        Stage(
            "tests",
            [*pytest, "--maxfail=50", "-m", "not slow", *spread],
            150,
            {"CONVEXT_TEST_DEVICE": "cuda"},
        ),
    ]
    made += [
        Stage(
            f"train, {layers}", [*train, "--layers", layers, "--out", folder / f"run-{layers}"], 45
        )
        for layers in ("convext", "torch")
    ]
    made += [
        Stage(f"bench, {dtype}", [*bench, "--dtypes", dtype, "--report", folder / dtype], 60)
        for dtype in BENCH
    ]
    if shutil.which("compute-sanitizer"):
        look = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "5", "--tool"]
        made += [
            Stage(
                f"sanitizer, {tool}",
                [*look, tool, *python, "tests/gpu_sanitized.py"],
                60,
                # Each tensor an allocation of its own, whose ends are watched.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in SANITIZERS
        ]
    return made


MACHINE = """
import pathlib, subprocess, sys, sysconfig, torch
headers = pathlib.Path(sysconfig.get_path("include"), "Python.h")
print("Python", sys.version, "" if headers.is_file() else f"without {headers}: there is no build")
print(torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
for command in (["nvidia-smi"], ["nvcc", "--version"]):
    try:
        print(subprocess.run(command, capture_output=True, text=True).stdout)
    except OSError as error:
        print(error)
print(torch.cuda.get_device_name())
"""


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _arch() -> str:
    """Of the GPU that is there, as TORCH_CUDA_ARCH_LIST has it; of an H200 where none is."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def run(listed: list[Stage], folder: Path, seconds: float) -> bool:
    """Run all that the time allows, writing the report anew after each. Whether all passed."""
    end = time.monotonic() + seconds
    for stage in listed:
        left = end - time.monotonic()
        built = all(s.status == 0 for s in listed if s.name == "build" and s is not stage)
        if left < 5 or not (built or stage.name in ("machine", "build")):
            stage.output = "not run: " + ("the time is over" if left < 5 else "there is no build")
        else:
            print(f"{stage.name} ...", flush=True)
            stage.run(min(stage.limit, left))
            print(f"    {stage.result}, {stage.seconds:.0f} s: {stage.summary}", flush=True)
        write(listed, folder)
    return all(stage.status == 0 for stage in listed)


def write(listed: list[Stage], folder: Path) -> None:
    """The report of what has run so far."""
    lines = [
        "# convext on a GPU",
        "",
        "| stage | result | seconds | |",
        "| --- | --- | ---: | --- |",
    ]
    for stage in listed:
        said = stage.summary.replace("|", "\\|")
        lines.append(f"| {stage.name} | {stage.result} | {stage.seconds:.0f} | {said} |")
    for stage in listed:
        if stage.name in ("machine", "tests") or stage.name.startswith(("train", "sanitizer")):
            lines += ["", f"## {stage.name}", "", "```", _tail(stage.output, 60), "```"]
    measured = {}
    for dtype in BENCH:
        report = folder / dtype / "report.md"
        if report.is_file():
            lines += ["", f"## bench, {dtype}", "", report.read_text().replace("\n#", "\n##")]
            measured[dtype] = json.loads((folder / dtype / "report.json").read_text())
    trained = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("run-*/metrics.json")
    }
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    content = {
        "stages": [
            {**asdict(s), "command": list(map(str, s.command)), "output": _tail(s.output, 20)}
            for s in listed
        ],
        "trained": trained,
        "bench": measured,
    }
    (folder / "report.json").write_text(json.dumps(content))
    log = (f"===== {s.name}\n{' '.join(map(str, s.command))}\n{s.output}\n" for s in listed)
    (folder / "log.txt").write_text("\n".join(log))


def _tail(text: str, count: int) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])


def main() -> None:
    """Run the stages, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"))
    parser.add_argument("--data-dir", help="where the MNIST files lie (default: as in training)")
    parser.add_argument("--seconds", type=float, default=570, help="for all of it")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of stages' names")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    listed = stages(folder, options.data_dir)
    if options.only:
        listed = [stage for stage in listed if stage.name.startswith(tuple(options.only))]
    raise SystemExit(0 if run(listed, folder, options.seconds) else 1)


if __name__ == "__main__":
    main()
