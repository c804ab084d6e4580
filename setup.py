"""Builds `convext._C`: every C++ file under csrc/, and csrc/cuda where CUDA is to be had.

Everything else about the package is in pyproject.toml. Environment:

CONVEXT_CUDA          0 builds without CUDA, 1 insists on it; unset builds it where both nvcc and a
                      CUDA build of torch are found (whether a GPU is visible plays no part)
TORCH_CUDA_ARCH_LIST  as in PyTorch, e.g. "8.0;9.0a+PTX"; unset means CUDA_ARCHS below
MAX_JOBS              parallel compilations; unset means one for each core
CFLAGS                further flags for the C++ compiler, which take precedence ("-g", "-O1")
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError


def cuda_home() -> str | None:
    """The folder of nvcc and its headers. torch takes any that an nvcc is in, also where that is
    a script in /usr/local/bin which starts another.
    """
    found = shutil.which("nvcc")
    homes = [Path(found).resolve().parents[1]] if found else []
    headers = Path("include/cuda_runtime_api.h")
    complete = (home for home in [*homes, Path("/usr/local/cuda")] if (home / headers).is_file())
    return next(map(str, complete), None)


if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and cuda_home():
    os.environ["CUDA_HOME"] = cuda_home()  # read by the import

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # Metadata and source distributions need no torch; BuildConvext.run refuses to compile without.
    from setuptools.command.build_ext import build_ext as BuildExtension

    torch = None

# `.venv/bin/pip` without the venv activated would miss the ninja that is installed there.
os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0")
# No contraction of a*b + c behind our back: kernels write fma() where they mean it, and so give
# the same bits whatever the compiler. Hidden symbols: nothing but the module's init is exported.
# C++20 is torch's own standard since some release; ours, for comparisons written by the compiler.
# No debug information, which Python's own flags often ask for: it doubles the time to compile.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra"]
# The same of nvcc. -lineinfo: profilers and compute-sanitizer name our lines.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"]
# clang's -fopenmp calls libomp, which a torch made with GCC does not load; hence the refusal.
OPENMP_PROBE = """
#if defined(__clang__) && !defined(__APPLE__)
#error "calls another OpenMP runtime than torch's"
#endif
#include <omp.h>
int threads() { return omp_get_max_threads(); }
"""


def cuda_obstacle() -> str | None:
    """What keeps the CUDA kernels from being built, or None."""
    if not (CSRC / "cuda").is_dir():
        return "this source tree has no csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if nvcc() is None:
        return "nvcc was not found (put it on PATH or set CUDA_HOME)"
    return None


def nvcc() -> Path | None:
    home = cpp_extension.CUDA_HOME
    path = Path(home or "", "bin", "nvcc")
    return path if home and path.is_file() else None


def use_cuda() -> bool:
    wish = os.environ.get("CONVEXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"CONVEXT_CUDA must be 0 or 1, got {wish!r}")
    obstacle = cuda_obstacle()
    if wish == "1" and obstacle:
        sys.exit(f"CONVEXT_CUDA=1 asks for the CUDA kernels, but {obstacle}")
    return wish != "0" and obstacle is None


def cuda_archs() -> str:
    """CUDA_ARCHS as far as this nvcc knows them, with PTX of the newest for GPUs to come."""
    listed = subprocess.run(
        [nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    archs = [arch for arch in CUDA_ARCHS if arch.replace(".", "").rstrip("a") in known]
    # PTX of an "a" architecture runs on that one alone, so it is no help to newer GPUs.
    newest = max(i for i, arch in enumerate(archs) if not arch.endswith("a"))
    archs[newest] += "+PTX"
    return ";".join(archs)


def sources(with_cuda: bool) -> list[str]:
    """Source paths relative to here, as setuptools wants them, in a fixed order."""
    found = [path.relative_to(ROOT) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu")]
    return sorted(p.as_posix() for p in found if with_cuda or p.parts[:2] != ("csrc", "cuda"))


def extension() -> Extension:
    headers = sorted(path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*.h"))
    if torch is None:
        return Extension("convext._C", sources(with_cuda=False), depends=headers)
    with_cuda = use_cuda()
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    made = make("convext._C", sources(with_cuda), depends=headers)
    # Torch's headers come in as system headers: warnings are for our own code.
    system = [flag for path in made.include_dirs for flag in ("-isystem", path)]
    made.include_dirs = [str(CSRC)]
    wished = shlex.split(os.environ.get("CFLAGS", ""))
    made.extra_compile_args = {"cxx": CXX_FLAGS + system + wished, "nvcc": NVCC_FLAGS + system}
    # The versions are on every command line, so another torch makes ninja compile anew.
    made.define_macros = [("CONVEXT_TORCH_VERSION", f'"{torch.__version__}"')]
    if with_cuda:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs())
        # Asked for here, for torch adds none to a command that has "arch" anywhere, in a path too.
        made.extra_compile_args["nvcc"] += cpp_extension._get_cuda_arch_flags([])
        made.define_macros += [
            ("CONVEXT_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("CONVEXT_CUDA_ARCHS", f'"{archs}"'),
        ]
    return made


class BuildConvext(BuildExtension):
    """Torch's build_ext, plus OpenMP, our version macro and a record of the torch built against."""

    def initialize_options(self):
        super().initialize_options()
        # One folder of objects for every way to build: an editable install, which would compile
        # in a temporary one, leaves them to `setup.py build_ext --inplace` and back.
        self.build_temp = f"build/objects-{sys.implementation.cache_tag}"

    def run(self):
        if torch is None:
            sys.exit(
                "convext is compiled against torch, and this Python has none: install torch first"
            )
        super().run()
        self.write_record()

    def build_extensions(self):
        (module,) = self.extensions
        module.define_macros.append(("CONVEXT_VERSION", f'"{self.distribution.get_version()}"'))
        module.extra_compile_args["cxx"] += self.openmp_flags()
        super().build_extensions()

    def openmp_flags(self) -> list[str]:
        """at::parallel_for is header code, and serial unless compiled with OpenMP.

        For the compiler only, never the linker: the calls find the runtime that torch has loaded,
        and a second one in the process would bring its own threads.
        """
        flags = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(OPENMP_PROBE)
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                print("convext: no OpenMP of torch's kind in this compiler; built to run serially")
                return []
        return flags

    def write_record(self):
        """Beside the shared library; convext/_build_check.py reads it before loading that."""
        cuda = any(name == "CONVEXT_CUDA_VERSION" for name, _ in self.extensions[0].define_macros)
        record = Path(self.get_ext_fullpath("convext._C")).with_name("_built_with.py")
        record.write_text(
            "# Written by setup.py on every build; not to be edited or committed.\n"
            f'VERSION = "{self.distribution.get_version()}"\n'
            f'TORCH = "{torch.__version__}"\n'
            f"CUDA = {torch.version.cuda if cuda else None!r}\n"
        )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildConvext})
