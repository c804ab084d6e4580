"""What `make cuda-check` reads in ptxas' words; where there is an nvcc, that it sees spills."""

import re
import subprocess
import sys

import pytest
from cuda_check import ROOT, Kernel, parse, shortened, table
from cuda_toolkit import nvcc

# Of nvcc 13.0, but for the numbers of the second.
NAME = "_ZN7convext4cuda43_GLOBAL__N__d59d2284_7_a_cu_7e3eff3914forward_kernelI{}EEvPKT_PS3_l"
SAID = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME.format("f")}' for 'sm_80'
ptxas info    : Function properties for {NAME.format("f")}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 100 registers, used 1 barriers, 2048 bytes smem, 632 bytes cmem[0]
ptxas info    : Compile time = 49.088 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME.format("d")}' for 'sm_90a'
ptxas info    : Function properties for {NAME.format("d")}
    40 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compile time = 172.230 ms
"""


def test_every_kernel_is_read():
    assert parse(SAID, "a.cu") == [
        Kernel("a.cu", NAME.format("f"), "80", registers=100, shared=2048, stack=0, spills=0),
        Kernel("a.cu", NAME.format("d"), "90a", registers=255, shared=0, stack=40, spills=48),
    ]
    assert parse("ptxas info    : 0 bytes gmem\n", "a.cu") == []


def test_words_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="no registers"):
        parse(SAID.replace("Used 255 registers", "Uses registers"), "a.cu")


def test_names_are_as_in_the_source():
    name = (
        "void convext::cuda::(anonymous namespace)::f<convext::cuda::Sum<float>, 3>(int, g<(h)0>)"
    )
    assert shortened(name) == "f<Sum<float>, 3>"


def test_table():
    kernels = [
        Kernel("b.cu", "f", "80", 100, 2048, 0, 0),
        Kernel("b.cu", "f", "90a", 96, 1024, 0, 8),
        Kernel("b.cu", "e", "90a", 32, 0, 0, 0),
        Kernel("a.cu", "f", "80", 8, 0, 16, 0),
    ]
    assert table(kernels).splitlines() == [
        "sm_80  sm_90a  shared  stack  spills  file  kernel",
        "    8               0     16       0  a.cu  f",
        "           32       0      0       0  b.cu  e",
        "  100      96    2048      0       8  b.cu  f",
    ]


SPILLS = """
// A hundred values of each of a thousand threads, alive at once.
__global__ void __launch_bounds__(1024) spilling(volatile float* a, int n) {
  float values[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) values[i] = a[threadIdx.x + i];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 100; ++i) values[i] = values[i] * values[i] + a[k];
  }
#pragma unroll
  for (int i = 0; i < 100; ++i) a[threadIdx.x + i] = values[i];
}
"""
WARNS = "__global__ void f(int* a) { int unused; *a = 1; }\n"


@pytest.mark.skipif(nvcc() is None, reason="no nvcc: `make cuda-check` installs one")
@pytest.mark.parametrize(
    ("source", "complaint"),
    [(SPILLS, r"sm_80: spilling spills \d+ bytes"), (WARNS, '"unused" was declared but never')],
    ids=["spill", "warning"],
)
def test_a_bad_kernel_fails(tmp_path, source, complaint):
    path = tmp_path / "bad.cu"
    path.write_text(source)
    command = [sys.executable, ROOT / "tests/cuda_check.py", "--archs", "80", "--", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(complaint, done.stderr), done.stderr
