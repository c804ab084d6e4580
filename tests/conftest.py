"""Devices, ISAs and algorithms as parameters, and global state put back after each test.

A test that takes `device`, `isa` or `algorithm` runs for every combination that exists: ISAs are
the CPU's, algorithms those of the device. One that takes a problem besides runs on the algorithms
that do it, one that brings tensors of its own on those that do everything.

CONVEXT_TEST_DEVICE=cuda leaves all tests out but those of CUDA, and fails where there can be none.
"""

import os
import random

import numpy as np
import pytest
import torch
from emulated_cuda import SANITIZER, Kernels, build, cuda_include
from problems import PROBLEMS, Conv2dProblem
from reference import declines

import convext
from convext import _C


def _cuda_obstacle() -> str | None:
    """Why nothing can be tested on CUDA here, or None."""
    if _C.build_info()["cuda"] is None:
        return "convext was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is available"


def _devices() -> list[str]:
    if _only_cuda():
        return ["cuda"]
    return ["cpu"] if _cuda_obstacle() else ["cpu", "cuda"]


def _only_cuda() -> bool:
    return os.environ.get("CONVEXT_TEST_DEVICE") == "cuda"


def pytest_configure():
    wish = os.environ.get("CONVEXT_TEST_DEVICE", "")
    if wish not in ("", "cuda"):
        raise pytest.UsageError(f"CONVEXT_TEST_DEVICE must be cuda or unset, got {wish!r}")
    if _only_cuda() and (obstacle := _cuda_obstacle()):
        raise pytest.UsageError(f"CONVEXT_TEST_DEVICE=cuda: {obstacle}")


def _algorithms(device: str) -> tuple[str, ...]:
    listed = getattr(convext, "algorithms", None)
    return listed(device) if listed else ("direct", "im2col")


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-all",
        action="store_true",
        help="run the CUDA kernels on the CPU for every problem, dtype and layout",
    )


def pytest_generate_tests(metafunc):
    names = [name for name in ("device", "isa", "algorithm") if name in metafunc.fixturenames]
    if not names:
        return
    rows = []
    for device in _devices():
        for isa in _C.cpu_isas() if device == "cpu" and "isa" in names else [None]:
            for algorithm in _algorithms(device) if "algorithm" in names else [None]:
                row = {"device": device, "isa": isa, "algorithm": algorithm}
                rows.append(
                    pytest.param(
                        *(row[name] for name in names),
                        id="-".join(str(row[name]) for name in names if row[name]),
                    )
                )
    metafunc.parametrize(names, rows, indirect=[name for name in names if name == "isa"])


def _declined(item: pytest.Item) -> bool:
    """Whether a test is of an algorithm that cannot do its problem."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "algorithm" not in parameters:
        return False
    problems = [p for p in parameters.values() if isinstance(p, Conv2dProblem)]
    return any(declines(parameters["algorithm"], p) for p in problems or PROBLEMS)


def pytest_collection_modifyitems(items):
    """Pairs that an algorithm declines are no tests, but for the one that sees them refused.

    That is `test_conv2d_errors.py::test_a_declined_problem_is_an_error`.
    """
    items[:] = [
        item
        for item in items
        if not _declined(item) and not (_only_cuda() and not _is_of_cuda(item))
    ]


def _is_of_cuda(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("device") == "cuda" or "gpu" in item.fixturenames


def pytest_terminal_summary(terminalreporter):
    """Sums of what test_opinfo.py records: label, samples that passed, samples that ran."""
    sums = {}
    for report in (r for o in ("passed", "failed") for r in terminalreporter.getreports(o)):
        for name, value in report.user_properties:
            if name == "samples":
                label, *counts = value
                sums[label] = [a + b for a, b in zip(sums.get(label, (0, 0)), counts, strict=True)]
    if sums:
        sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
        terminalreporter.section("PyTorch's own samples")
        for label, (passed, run) in sums.items():
            terminalreporter.write_line(f"{passed:5} of {run:5} passed   {label}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests are small, and threads that wait for each other spin; some ask for more themselves."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32_is_exact():
    """On CUDA, too, where PyTorch allows TF32 at first; tests of TF32 allow it themselves."""
    if _cuda_obstacle():
        yield
        return
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    """The CUDA kernels on the CPU, compiled once."""
    if cuda_include() is None:
        pytest.skip("CUDA's headers are not here")
    sanitizer = os.environ.get(SANITIZER, "plain")
    return Kernels(build(tmp_path_factory.mktemp("cuda_kernels"), sanitizer))


@pytest.fixture
def isa(request):
    """The CPU ISA in use during the test; None on other devices."""
    before = _C.cpu_isa()
    if request.param:
        _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def restore_isa():
    """For tests that change the ISA themselves."""
    before = _C.cpu_isa()
    yield
    _C.set_cpu_isa(before)


@pytest.fixture
def restore_threads():
    """For tests that change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu():
    """For tests that make sense on CUDA only."""
    obstacle = _cuda_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    return "cuda"
