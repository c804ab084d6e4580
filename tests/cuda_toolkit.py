"""Where the CUDA toolkit is: nvcc and the headers, which need no GPU."""

import os
import shutil
import sysconfig
from pathlib import Path


def toolkits() -> list[Path]:
    """Folders with bin/nvcc or include/cuda_fp16.h in them, the first to be preferred."""
    found = shutil.which("nvcc")
    on_path = [Path(found).resolve().parents[1]] if found else []
    named = [Path(os.environ[name]) for name in ("CUDA_HOME",) if os.environ.get(name)]
    # What tests/requirements-nvcc.txt installs.
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
    return [*named, *on_path, Path("/usr/local/cuda"), wheels]


def nvcc() -> Path | None:
    """The compiler."""
    paths = (home / "bin" / "nvcc" for home in toolkits())
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def cuda_include() -> Path | None:
    """The folder of cuda_fp16.h and its like, which are headers of the host compiler's too."""
    paths = (home / "include" for home in toolkits())
    return next((path for path in paths if (path / "cuda_fp16.h").is_file()), None)
