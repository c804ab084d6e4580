"""Refuses, in one sentence, a torch that the compiled library cannot be loaded with.

To be called before `convext._C` is imported: past that point the loader's own answer is an
undefined symbol with a mangled name, or a crash.
"""

import torch

_REBUILD = "rebuild it with `pip install --no-build-isolation --no-deps --force-reinstall .`"


def check_build() -> None:
    """Raise ImportError unless convext was compiled against the torch that is imported.

    PyTorch keeps its C++ interface within a minor release, so 2.13.0 and 2.13.1 go together and
    2.13 and 2.14 do not. CPU kernels work beside any variant (cpu, cu126, ...) of that release;
    CUDA kernels need a torch built for the same major version of CUDA.
    """
    try:
        from convext import _built_with
    except ImportError:
        raise ImportError(
            "convext is not built: run `pip install --no-build-isolation -e .` in its source folder"
        ) from None
    obstacle = mismatch(
        _built_with.TORCH, _built_with.CUDA, str(torch.__version__), torch.version.cuda
    )
    if obstacle:
        raise ImportError(f"{obstacle}: {_REBUILD} in convext's source folder")


def mismatch(
    built_torch: str, built_cuda: str | None, torch_version: str, torch_cuda: str | None
) -> str | None:
    """Say why a library built for the first two cannot be loaded beside the last two, or None."""
    if built_torch.split(".")[:2] != torch_version.split(".")[:2]:
        return f"convext was built against torch {built_torch} but this is torch {torch_version}"
    if built_cuda is not None and (torch_cuda or "none").split(".")[0] != built_cuda.split(".")[0]:
        return (
            f"convext was built for CUDA {built_cuda} but torch {torch_version} has "
            f"{'CUDA ' + torch_cuda if torch_cuda else 'no CUDA'}"
        )
    return None
