"""The AVX-512 kernels on any x86 machine: compiled against SIMD Everywhere instead of the CPU.

What the machine itself can run is tested by the other files through the `isa` fixture; this file
sees to it that no kernel in the build goes untested where the instructions are missing.
"""

import ctypes
import itertools
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, Conv2dProblem
from torch import Tensor
from torch.nn import functional as F

import convext

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("forward", "grad_input", "grad_weight")  # as Conv2dPass counts them
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as DType does
LAYOUTS = (torch.contiguous_format, torch.channels_last)  # as Layout does

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"AVX-512 is not in a build for {platform.machine()}")
    if "avx2" not in convext.build_info()["cpu_isas"] or "avx2" not in convext._C.cpu_isas():
        pytest.skip("emulated fused multiply-adds need a CPU with FMA")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMD Everywhere is not installed (Debian: libsimde-dev)")
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++20", "-ffp-contract=off", "-fPIC", "-Wno-psabi"]
    flags += ["-mavx2", "-mfma", "-mf16c", "-DCONVEXT_EMULATE_SIMD"]
    flags += [f"-I{ROOT}/tests/emulation", f"-I{ROOT}/csrc"]

    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        # -O1 takes half the time, but with it g++ 12 makes of the emulated instructions (not of the
        # real ones) filters of Winograd's that are wrong.
        optimize = "-O2" if source.stem == "isa_avx512" else "-O1"
        subprocess.run(["g++", *flags, optimize, "-c", source, "-o", made], check=True)
        return made

    sources = [ROOT / "tests/emulation/kernels_c.cpp", *(ROOT / "csrc/cpu/kernels").glob("*.cpp")]
    # The longest ones first.
    sources.sort(key=lambda s: (s.stem != "isa_avx512", not s.name.startswith("isa_")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "kernels.so"
    subprocess.run(["g++", "-shared", "-o", library, *objects], check=True)
    return ctypes.CDLL(str(library))


def run(
    kernels: ctypes.CDLL,
    isa: str,
    algorithm: str,
    conv_pass: str,
    problem: Conv2dProblem,
    layout,
    data,
) -> Tensor:
    """One pass through the C interface, on the operands in `data` that it reads."""
    data = {
        name: tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor
        for name, tensor in data.items()
    }
    reads = {
        "forward": ("input", "weight", "bias"),
        "grad_input": ("weight", "grad_output"),
        "grad_weight": ("input", "grad_output"),
    }[conv_pass]
    like = {"forward": "grad_output", "grad_input": "input", "grad_weight": "weight"}[conv_pass]
    output = torch.empty_like(data[like])
    pointers = [
        ctypes.c_void_p(data[name].data_ptr()) if name in reads else None
        for name in ("input", "weight", "bias", "grad_output")
    ]
    p = problem
    sizes = (p.N, p.C, p.H, p.W, p.O, *p.kernel, *p.stride, *p.padding, *p.dilation, p.groups)
    failed = kernels.convext_conv2d(
        isa.encode(),
        algorithm.encode(),
        PASSES.index(conv_pass),
        DTYPES.index(output.dtype),
        LAYOUTS.index(layout),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *pointers,
        ctypes.c_void_p(output.data_ptr()),
    )
    assert not failed, f"no ISA {isa} or no algorithm {algorithm}"
    return output


def operands(problem: Conv2dProblem, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {
        "input": problem.input_size,
        "weight": problem.weight_size,
        "bias": (problem.O,),
        "grad_output": problem.output_size,
    }
    return {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_same_bits_as_avx2(kernels, problem, algorithm, dtype, layout):
    """No sum crosses lanes and blocks are cut alike, so only the width of the vectors differs."""
    data = operands(problem, dtype)
    for conv_pass in PASSES:
        ours, avx2 = (
            run(kernels, isa, algorithm, conv_pass, problem, layout, data)
            for isa in ("avx512", "avx2")
        )
        assert torch.equal(ours, avx2), conv_pass


def test_harness_computes_the_convolution(kernels):
    """The comparison above means something: what both ISAs agree on is the right answer."""
    for problem in PROBLEMS[:8]:
        data = operands(problem, torch.float64)
        ours = run(kernels, "avx512", "direct", "forward", problem, LAYOUTS[0], data)
        expected = F.conv2d(data["input"], data["weight"], data["bias"], *problem.settings)
        torch.testing.assert_close(ours, expected)


BATCH_NORMS = ("train", "eval", "backward of train", "backward of eval", "sum of a bias")


RELUS = ("none", "before the norm", "after the norm")  # as Relu counts them


def pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t if t is None else t.data_ptr() for t in tensors))


@pytest.mark.parametrize("layout", [0, 1], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("what", "relu"),
    [
        *((what, "none") for what in BATCH_NORMS),
        ("eval", "after the norm"),
        *((what, relu) for what in BATCH_NORMS[2:4] for relu in RELUS[1:]),
    ],
)
def test_batch_norm_has_the_same_bits_as_avx2(kernels, what, relu, dtype, layout):
    """Columns of the layout's matrix are lanes, so here too no sum crosses lanes."""
    for sizes in [(2, 3, 5), (33, 1, 49), (7, 8, 196), (64, 17, 4), (5, 70, 1), (300, 33, 2)]:
        count, channels = sizes[0] * sizes[1] * sizes[2], sizes[1]
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        given = [torch.randn(count).to(dtype) for _ in range(2)]  # input, grad_output
        given += [torch.rand(channels).to(sum_dtype) + 0.5 for _ in range(4)]  # weight ... var
        results = []
        for isa in ("avx512", "avx2"):
            outputs = [torch.zeros(count, dtype=dtype)]  # then grad_weight, grad_bias, the sum
            outputs += [torch.zeros(channels, dtype=sum_dtype) for _ in range(3)]
            arrays = [tensor.clone() for tensor in given] + outputs
            failed = kernels.convext_batch_norm(
                isa.encode(),
                BATCH_NORMS.index(what),
                RELUS.index(relu),
                DTYPES.index(dtype),
                layout,
                (ctypes.c_int64 * 3)(*sizes),
                pointers(arrays),
            )
            assert not failed
            results.append(arrays)
        for ours, avx2 in zip(*results, strict=True):
            assert torch.equal(ours, avx2), sizes
        assert any(output.count_nonzero() for output in results[0][6:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["train", "eval", "eval that keeps the activation"])
def test_block_has_the_same_bits_as_avx2(kernels, what, dtype, layout):
    computed = 0
    for problem, relu in itertools.product(PROBLEMS, (1, 2)):
        data = operands(problem, dtype)
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        given = [data[name] for name in ("input", "weight", "bias")]
        given += [torch.rand(problem.O).to(sum_dtype) + 0.5 for _ in range(4)]
        given = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in given]
        p = problem
        sizes = (p.N, p.C, p.H, p.W, p.O, *p.kernel, *p.stride, *p.padding, *p.dilation, p.groups)
        results = []
        for isa in ("avx512", "avx2"):
            arrays = [tensor.clone(memory_format=torch.preserve_format) for tensor in given]
            output = torch.zeros(p.output_size, dtype=dtype)
            activation = None if what == "eval" else torch.zeros_like(output)
            failed = kernels.convext_conv_block(
                isa.encode(),
                what == "train",
                relu,
                DTYPES.index(dtype),
                LAYOUTS.index(layout),
                (ctypes.c_int64 * len(sizes))(*sizes),
                pointers([*arrays, activation, output]),
            )
            assert not failed
            results.append([*arrays, output, output if activation is None else activation])
        for ours, avx2 in zip(*results, strict=True):
            assert torch.equal(ours, avx2), f"{problem}, {relu}"
        computed += output.count_nonzero().item()
    assert computed > 1000
