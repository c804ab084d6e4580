"""Options of the benchmarks, and the table at their end."""

import timing
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads that torch may use")


def pytest_configure(config):
    config.comparisons = []
    torch.set_num_threads(config.getoption("--threads"))


def pytest_terminal_summary(terminalreporter, config):
    if not config.comparisons:
        return
    terminalreporter.section(
        f"ours beside torch {torch.__version__}, {torch.get_num_threads()} thread(s); "
        "ratio above 1: ours is faster"
    )
    terminalreporter.line(timing.HEADER)
    for comparison in config.comparisons:
        terminalreporter.line(str(comparison))
