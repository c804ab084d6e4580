"""Options of the kernels' benchmarks."""

import pytest
import torch

from convext.bench.suite import DTYPES


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads that torch may use")
    parser.addoption("--dtype", choices=DTYPES, default="float32", help="of all operands")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture
def dtype(request):
    return DTYPES[request.config.getoption("--dtype")]
