"""Compiles the CUDA half for real GPUs, none of which is needed for it (`make cuda-check`).

Every kernel with warnings as errors; what the assembler says of each becomes a table, and one that
spills registers an error. The glue, too, as far as the headers of a torch without CUDA go. Exits
with 3 where there is no nvcc.
"""

import argparse
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import cuda_include, nvcc

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCHS = ("75", "80", "90a")
NO_NVCC = 3
# As setup.py compiles, and torch's build_ext, which takes conversions of 16-bit types away.
TORCHS = tuple(
    f"-D__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
)
FLAGS = ("-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo", *TORCHS)
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler=-Wall,-Wextra")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture: registers and bytes, of each thread."""

    file: str
    name: str  # mangled
    arch: str
    registers: int
    shared: int  # of each block, without what a launch adds
    stack: int
    spills: int  # stored and loaded


def parse(text: str, file: str) -> list[Kernel]:
    """Kernels in the output of `nvcc -Xptxas -v`, of that file."""
    kernels = []
    start = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        if not (found := start.search(part)):
            continue

        def number(pattern: str, part: str = part) -> int:
            # A function that a kernel calls has properties of its own: none may spill.
            return sum(map(int, re.findall(pattern, part)))

        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise ValueError(f"{file}: no registers in ptxas' words: {part!r}")
        kernels.append(
            Kernel(
                file,
                *found.groups(),
                registers=int(registers[1]),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return kernels


def readable(names: Iterable[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters; as they are without c++filt."""
    names = list(names)
    try:
        done = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    return [shortened(name) for name in done.stdout.splitlines()]


def shortened(name: str) -> str:
    """A demangled kernel's name without return type, namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("convext::cuda::", "")
    name = name.replace("convext::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def table(kernels: Iterable[Kernel]) -> str:
    """A line for each kernel; registers are of each architecture in turn."""
    by_name: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault((kernel.file, kernel.name), {})[kernel.arch] = kernel
    archs = sorted(
        {arch for of in by_name.values() for arch in of}, key=lambda a: int(a.strip("a"))
    )
    lines = [[f"sm_{arch}" for arch in archs] + ["shared", "stack", "spills", "file", "kernel"]]
    names = readable(name for _, name in by_name)
    titles = ((file, name) for (file, _), name in zip(by_name, names, strict=True))
    for title, of in sorted(zip(titles, by_name.values(), strict=True), key=lambda row: row[0]):
        registers = [str(of[arch].registers) if arch in of else "" for arch in archs]
        worst = [
            str(max(getattr(kernel, field) for kernel in of.values()))
            for field in ("shared", "stack", "spills")
        ]
        lines.append([*registers, *worst, *title])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
        for line in lines
    )


def compile_kernels(source: Path, archs: Iterable[str], folder: Path) -> tuple[str, float]:
    """Compile one .cu file. Returns what was said and the seconds of CPU time it took."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [nvcc(), *FLAGS, *STRICT, f"-I{CSRC}", *targets, "-c", source]
    return _run([*command, "-o", folder / f"{source.name}.o"])


def check_host(source: Path) -> tuple[str, float]:
    """Compile a .cpp file of the kernels as the host compiler does, which has no CUDA header."""
    return _run(
        ["c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-fsyntax-only", source]
    )


def check_glue(folder: Path) -> tuple[str, float]:
    """Compile the glue as one file: most of the time is torch's headers'."""
    from torch.utils import cpp_extension

    sources = [*sorted((CSRC / "cuda").glob("*.cpp")), CSRC / "module.cpp"]
    unit = folder / "glue.cpp"
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    python = f"-isystem{sysconfig.get_path('include')}"
    system = [f"-isystem{path}" for path in [*cpp_extension.include_paths(), cuda_include()]]
    macros = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DTORCH_EXTENSION_NAME=_C"]
    for name in ("CONVEXT_VERSION", "CONVEXT_TORCH_VERSION", "CONVEXT_CUDA_VERSION"):
        macros.append(f'-D{name}=""')
    macros.append('-DCONVEXT_CUDA_ARCHS=""')
    command = ["c++", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    return _run([*command, *macros, *system, python, "-fsyntax-only", unit])


def _run(command: list[object]) -> tuple[str, float]:
    """What a command says, and its CPU time, which says the same on a busy machine."""
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        said = file.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{said}")
    return said, used.ru_utime + used.ru_stime


def main() -> None:
    """Check everything, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="such as 80 90a")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or 1))
    parser.add_argument("--find", action="store_true", help="only look for nvcc")
    parser.add_argument("sources", nargs="*", type=Path, help=".cu files (default: all)")
    options = parser.parse_args()
    if nvcc() is None:
        print("no nvcc: neither on PATH nor under CUDA_HOME, nor the wheels of nvidia-cuda-nvcc")
        raise SystemExit(NO_NVCC)
    if options.find:
        print(nvcc())
        return
    kernels_folder = CSRC / "cuda" / "kernels"
    sources = options.sources or sorted(kernels_folder.glob("*.cu"))
    kernels = []
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        folder = Path(name)
        compiled = [pool.submit(compile_kernels, s, options.archs, folder) for s in sources]
        others = {}
        if not options.sources:
            others = {s.name: pool.submit(check_host, s) for s in kernels_folder.glob("*.cpp")}
            others["the glue"] = pool.submit(check_glue, folder)
        print("CPU time of each file:")
        for source, job in zip(sources, compiled, strict=True):
            said, seconds = job.result()
            found = parse(said, source.name)
            kernels += found
            count = len({kernel.name for kernel in found})
            print(f"{seconds:6.1f} s  {source.name}: {count} kernels", flush=True)
        for title, job in others.items():
            print(f"{job.result()[1]:6.1f} s  {title}", flush=True)
    print(f"\nregisters of a thread, bytes of a block and of a thread\n{table(kernels)}")
    spilling = [kernel for kernel in kernels if kernel.spills]
    if spilling:
        names = readable(kernel.name for kernel in spilling)
        raise SystemExit(
            "\n".join(
                f"sm_{kernel.arch}: {name} spills {kernel.spills} bytes"
                for kernel, name in zip(spilling, names, strict=True)
            )
        )


if __name__ == "__main__":
    main()
