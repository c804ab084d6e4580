"""Every kernel by itself under pytest-benchmark: per-kernel JSON, and comparisons between commits.

make bench-kernels ARGS="-k 'mnist and forward' --benchmark-autosave"        on one commit, and then
make bench-kernels ARGS="-k 'mnist and forward' --benchmark-compare"         on another
make bench-kernels ARGS="--benchmark-json=kernels.json --threads 2"

The cases are those of `convext bench --quick`, each by PyTorch, by "auto" and by every algorithm.
Only figures of one run on one machine, or of a quiet one, may be compared; for ratios to PyTorch,
which need samples taken in turn, there is `convext bench`.
"""

import pytest

import convext
from convext.bench.cases import STOCK, WINOGRAD, Case
from convext.bench.suite import FORMATS, GROUPS


def parameters():
    """Case, name of the call and layout."""
    for cases in GROUPS.values():
        for case in cases(None, True):
            algorithms = convext.algorithms() if case.chooses else ()
            names = (STOCK, *case.ours, *algorithms)
            for name in names if case.quick else ():
                for layout in FORMATS:
                    label = f"{title(case)}, {name}, {layout}"
                    yield pytest.param(case, name, layout, id=label)


def title(case: Case) -> str:
    batch = f", batch {case.batch}" if case.batch else ""
    return f"{case.group}{batch}, {case.layer}, {case.what}"


@pytest.mark.parametrize(("case", "name", "layout"), list(parameters()))
def test_kernel(benchmark, dtype, case: Case, name: str, layout: str):
    call = case.make(dtype, FORMATS[layout])[name]
    try:
        call()
    except ValueError as error:
        if name not in (WINOGRAD, *convext.algorithms()):
            raise
        pytest.skip(str(error))
    benchmark.group = title(case)
    benchmark.extra_info.update(name=name, layout=layout, isa=convext.build_info()["cpu_isa"])
    benchmark(call)
