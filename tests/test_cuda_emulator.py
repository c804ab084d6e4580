"""What the emulator that runs CUDA kernels on a CPU computes, and that it finds mistakes.

tests/cuda_emulation/probes holds small kernels. Each probe tries an instruction against plain
loops; each fault has one mistake, which must be reported, and a twin without it, which must pass.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_toolkit import nvcc
from emulated_cuda import (
    FLAGS,
    PROBES,
    ROOT,
    build_probes,
    compiler_command,
    cuda_include,
)

if cuda_include() is None:
    pytest.skip("the headers of CUDA are not installed", allow_module_level=True)

NAMES = dict(
    reversed(match)
    for path in PROBES
    for match in re.findall(r"^(PROBE|FAULT)\((\w+)\)", path.read_text(), re.MULTILINE)
)
SCHEDULES = [("0", "late"), ("1", "early"), ("2", "late"), ("7", "early")]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """By name of the build, a program that runs one probe."""
    built = {}

    def program(build: str) -> Path:
        if build not in built:
            built[build] = build_probes(tmp_path_factory.mktemp(f"probes_{build}"), build)
        return built[build]

    return program


def run(program: Path, *arguments: str, order="0", copies="late") -> subprocess.CompletedProcess:
    schedule = {"CONVEXT_EMULATOR_ORDER": order, "CONVEXT_EMULATOR_ASYNC": copies}
    return subprocess.run(
        [program, *arguments], env={**os.environ, **schedule}, capture_output=True, text=True
    )


@pytest.mark.parametrize("build", FLAGS)
@pytest.mark.parametrize("name", [name for name, kind in NAMES.items() if kind == "PROBE"])
def test_instruction(programs, name, build):
    for order, copies in SCHEDULES:
        result = run(programs(build), name, order=order, copies=copies)
        assert result.returncode == 0, (order, copies, result.stderr)
        assert result.stdout == f"right: {name}\n"


@pytest.mark.parametrize("build", FLAGS)
@pytest.mark.parametrize("name", [name for name, kind in NAMES.items() if kind == "FAULT"])
def test_without_the_fault(programs, name, build):
    for order, copies in SCHEDULES:
        result = run(programs(build), name, "healthy", order=order, copies=copies)
        assert result.returncode == 0, (order, copies, result.stderr)


RACE = "race: .* and no barrier is between: block"
WRONG = "wrong result: "
# Of each fault: which build reports it, how, and, where it takes one, with which schedule.
FOUND = [
    ("missing_syncthreads", "plain", WRONG),
    ("missing_syncthreads", "race", RACE),
    ("missing_syncwarp", "plain", WRONG),
    ("missing_syncwarp", "race", RACE),
    ("missing_second_syncthreads", "plain", WRONG),
    ("missing_second_syncthreads", "race", RACE),
    ("copies_not_waited_for", "plain", WRONG),
    ("copies_not_waited_for", "race", RACE, "0", "early"),
    ("copies_waited_for_too_early", "plain", WRONG),
    ("copies_waited_for_too_early", "race", RACE, "0", "early"),
    ("copies_without_barrier", "plain", WRONG),
    ("copies_without_barrier", "race", RACE),
    ("copies_outlive_thread", "plain", "a thread ends before its copies were waited for"),
    ("misaligned_copy", "plain", "cp.async: an address is not a multiple of the size"),
    ("global_out_of_bounds", "address", r"AddressSanitizer: heap-buffer-overflow .*faults.cu:\d+"),
    ("static_shared_out_of_bounds", "address", r"faults.cu:\d+:\d+: runtime error: index 64 out"),
    ("dynamic_shared_out_of_bounds", "address", r"AddressSanitizer: heap-buffer-overflow .*faults"),
    ("misaligned_vector", "address", "runtime error: .* misaligned address"),
    ("divergent_barrier", "plain", "__syncthreads is reached at two places .*divergent barrier"),
    ("lost_barrier", "plain", "deadlock: waits at a barrier that others never reach"),
    ("lost_barriers", "plain", r"deadlock: .* block \(0,0,0\) thread \(1,0,0\)"),
    ("lost_barriers", "plain", r"deadlock: .* block \(19,0,0\) thread \(0,0,0\)", "1"),
    ("shuffle_not_reached_by_its_mask", "plain", "deadlock: waits in a warp operation that others"),
    ("shuffle_from_outside_of_its_mask", "plain", "a shuffle reads a lane that its mask lacks"),
    ("shuffles_at_two_places", "plain", "lanes of one mask are at different warp operations"),
    ("unwritten_shared", "plain", WRONG + "shared memory, at 191"),
    ("misaligned_ldmatrix", "plain", "ldmatrix: a row's address is not a multiple of 16"),
    ("ldmatrix_of_global_memory", "plain", "ldmatrix: a row is not in shared memory"),
    ("two_blocks_on_one_output", "race", r"race: .* block \(0,0,0\) .* nothing orders blocks"),
    ("count_without_atomics", "race", RACE),
    ("too_much_shared_memory", "plain", "launch: more shared memory than the 227 KiB"),
    ("too_many_blocks_along_y", "plain", "launch: a grid has 1 to 2147483647, 65535 and 65535"),
    ("mbarrier_uninitialised", "plain", "mbarrier: used before it was initialised"),
    ("mbarrier_expects_too_few_bytes", "plain", "deadlock: .* 0 arrivals and -16 bytes are"),
    ("mbarrier_expects_too_many_bytes", "plain", "deadlock: .* 0 arrivals and 16 bytes are"),
    ("tma_misaligned", "plain", "TMA: the destination is not a multiple of 128"),
    ("tma_not_waited_for", "plain", "mbarrier: more threads arrive than it counts"),
    ("tma_not_waited_for", "race", RACE),
    ("tma_into_what_is_read", "plain", "deadlock: waits at an mbarrier", "0", "early"),
    ("tma_into_what_is_read", "race", RACE),
    ("wgmma_without_fence", "plain", "wgmma: no fence between"),
    ("wgmma_not_waited_for", "plain", "a thread ends before its products were waited for"),
    ("tensor_map_with_odd_stride", "plain", "tensor map: a stride is not a multiple of 16"),
]


@pytest.mark.parametrize(
    ("name", "build", "message", "order", "copies"),
    [(*found, *("0", "late")[len(found) - 3 :]) for found in FOUND],
    ids=[f"{found[0]}-{found[1]}" for found in FOUND],
)
def test_fault_is_reported(programs, name, build, message, order, copies):
    results = [run(programs(build), name, "broken", order=order, copies=copies) for _ in range(2)]
    assert results[0].returncode != 0, "nobody noticed"
    assert re.search(message, results[0].stderr, re.DOTALL), results[0].stderr
    if build != "address":  # whose messages hold addresses
        assert results[0].stderr == results[1].stderr
        assert len(results[0].stderr.splitlines()) == 1
        if message != WRONG and "cuda emulator" in results[0].stderr:
            assert re.search(r"faults\.cu:\d+$", results[0].stderr.strip())


def test_every_fault_is_looked_for():
    faults = {name for name, kind in NAMES.items() if kind == "FAULT"}
    assert {found[0] for found in FOUND} == faults


NOT_CUDA = {
    "float atomics": ("atomicAdd(f, 1.0f)", "atomicAdd(i, 1)"),
    "double atomics": ("atomicAdd(d, 1.0)", "atomicMax(i, 1)"),
    "half atomics": ("atomicAdd(h, *h)", "atomicCAS(i, 1, 2)"),
    "active lanes": ("*i = __activemask()", "*i = __ballot_sync(~0u, 1)"),
}


@pytest.mark.parametrize("what", NOT_CUDA)
def test_refused_by_the_compiler(tmp_path, what):
    def compiles(statement: str) -> bool:
        source = tmp_path / "kernel.cu"
        source.write_text(
            '#include "cuda/kernels/device.h"\n'
            "__global__ void kernel(int* i, float* f, double* d, __half* h) "
            f"{{ (void)i, (void)f, (void)d, (void)h; {statement}; }}\n"
        )
        command = [*compiler_command("plain"), "-fsyntax-only", "-x", "c++", source]
        return subprocess.run(command, capture_output=True).returncode == 0

    broken, healthy = NOT_CUDA[what]
    assert compiles(healthy)
    assert not compiles(broken)


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
def test_nvcc_compiles_probes(tmp_path):
    """The same files, so that what the emulator was tried with is CUDA."""

    def compile_one(source: Path) -> subprocess.CompletedProcess:
        command = [nvcc(), "-std=c++20", "-O1", "-arch=sm_90a", "--expt-relaxed-constexpr"]
        command += ["-Werror", "all-warnings", f"-I{ROOT}/csrc", "-Xcompiler=-Wall,-Wextra"]
        # For the device: the host's half of the file is what the emulator compiles.
        command += ["-cubin", source, "-o", tmp_path / f"{source.stem}.cubin"]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compile_one, PROBES):
            assert result.returncode == 0, result.stderr
