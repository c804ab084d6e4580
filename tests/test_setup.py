"""What setup.py and the build backend decide, on source trees and environments made up here."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_check
import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path):
    """A source tree with files for both devices, all empty."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("library.cpp", "cpu/conv2d.cpp", "cuda/conv2d.cpp", "cuda/kernels/gemm.cu"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.fixture
def extension(tree, monkeypatch):
    """A function that runs setup.py and returns the extension module it would build."""
    monkeypatch.delenv("CONVEXT_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "unset below")  # so that setup.py's is undone
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    given = {}
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py adds to it
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))

    def run_setup():
        runpy.run_path(str(tree / "setup.py"))
        return given["ext_modules"][0]

    return run_setup


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """Stands in for a CUDA build of torch and for nvcc; a list of the architectures it knows."""
    archs = ["75", "80", "86", "87", "89", "90", "100", "120"]
    nvcc = tmp_path / "cuda_home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(nvcc.parents[1]))

    def answer(command, **_):
        assert [str(part) for part in command] == [str(nvcc), "--list-gpu-arch"]
        return SimpleNamespace(stdout="".join(f"compute_{arch}\n" for arch in archs))

    monkeypatch.setattr(subprocess, "run", answer)
    return archs


CPU_SOURCES = ["csrc/cpu/conv2d.cpp", "csrc/library.cpp"]
CUDA_SOURCES = ["csrc/cuda/conv2d.cpp", "csrc/cuda/kernels/gemm.cu"]


def test_cflags_go_before_our_own(extension, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-g -O1")
    flags = extension().extra_compile_args["cxx"]
    assert {"-g0", "-O3"} < set(flags)
    assert flags[-2:] == ["-g", "-O1"]  # of two that contradict each other the last one counts


def test_cuda_sources_stay_out_without_cuda(extension, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension().sources == CPU_SOURCES


def test_cuda_sources_come_in_with_nvcc_and_a_cuda_torch(extension, cuda):
    module = extension()
    assert module.sources == sorted(CPU_SOURCES + CUDA_SOURCES)
    assert ("CONVEXT_CUDA_VERSION", '"13.0"') in module.define_macros


def test_cuda_can_be_declined(extension, cuda, monkeypatch):
    monkeypatch.setenv("CONVEXT_CUDA", "0")
    assert extension().sources == CPU_SOURCES


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["75", "80", "86", "89", "90", "100", "120"], "7.5;8.0;8.6;8.9;9.0a;10.0+PTX"),
        (["50", "75", "80", "86", "89", "90"], "7.5;8.0;8.6;8.9+PTX;9.0a"),
    ],
)
def test_default_archs_are_those_nvcc_knows(extension, cuda, known, expected):
    cuda[:] = known
    module = extension()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected
    assert ("CONVEXT_CUDA_ARCHS", f'"{expected}"') in module.define_macros


def test_named_archs_are_kept(extension, cuda, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    module = extension()
    assert ("CONVEXT_CUDA_ARCHS", '"9.0a"') in module.define_macros
    flags = module.extra_compile_args["nvcc"]
    assert [flag for flag in flags if "-gencode" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]


def test_kernels_are_compiled_as_cuda_check_does(extension, cuda):
    # What it shows of registers and spills is then true of what is shipped.
    flags = extension().extra_compile_args["nvcc"]
    assert set(cuda_check.FLAGS) - set(cuda_check.TORCHS) <= set(flags)
    assert set(cuda_check.TORCHS) == {f for f in cpp_extension.COMMON_NVCC_FLAGS if "-D" in f}


def without_nvcc(monkeypatch, tree):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


def without_cuda_torch(monkeypatch, tree):
    monkeypatch.setattr(torch.version, "cuda", None)


def without_cuda_sources(monkeypatch, tree):
    shutil.rmtree(tree / "csrc" / "cuda")


@pytest.mark.parametrize(
    ("take_away", "reason"),
    [
        (without_nvcc, "nvcc was not found"),
        (without_cuda_torch, "is not a CUDA build"),
        (without_cuda_sources, "has no csrc/cuda"),
    ],
)
def test_insisting_on_cuda_names_what_is_missing(
    extension, cuda, tree, monkeypatch, take_away, reason
):
    take_away(monkeypatch, tree)
    monkeypatch.setenv("CONVEXT_CUDA", "1")
    with pytest.raises(
        SystemExit, match=f"CONVEXT_CUDA=1 asks for the CUDA kernels, but .*{reason}"
    ):
        extension()


def test_other_wishes_about_cuda_are_refused(extension, monkeypatch):
    monkeypatch.setenv("CONVEXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        extension()


@pytest.fixture
def backend(monkeypatch):
    """The build backend, in an environment as isolated as pip's: torch cannot be found."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import convext_build

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return convext_build


def test_backend_finds_the_interpreters_own_torch(backend):
    found = backend._users_torch()
    assert found["torch"] == torch.__version__
    assert str(Path(torch.__file__).parents[1]) in found["path"]
    assert backend.get_requires_for_build_wheel() == ["ninja"]


@pytest.mark.parametrize("answer", ["", '{"torch": "2.10.1", "path": []}'], ids=["none", "too old"])
def test_backend_asks_for_torch_only_where_there_is_none(backend, monkeypatch, answer):
    done = SimpleNamespace(stdout=answer, returncode=0 if answer else 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["ninja", "torch>=2.11"]


def test_backend_and_package_ask_for_the_same_torch(backend):
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest == ".".join(map(str, backend.MIN_TORCH))


def test_borrowed_torch_comes_after_the_isolated_environment(backend, monkeypatch):
    monkeypatch.setattr(sys, "path", ["/isolated"])
    monkeypatch.setattr(
        backend, "_users_torch", lambda: {"torch": "2.13.0", "path": ["", "/isolated", "/user"]}
    )
    backend._make_torch_importable()
    assert sys.path == ["/isolated", "/user"]
