"""The CUDA kernels on a CPU: csrc/cuda/kernels compiled against the emulator, and called."""

import ctypes
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_toolkit import cuda_include
from problems import Conv2dProblem
from reference import PASSES, Operands
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests/cuda_emulation"
PROBES = sorted((EMULATION / "probes").glob("*.cu"))
C_INTERFACE = EMULATION / "kernels_c.cpp"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as DType counts them
BATCH_NORMS = ("train", "eval", "backward of train", "backward of eval", "sum of a bias")
RELUS = ("none", "before the norm", "after the norm")  # as Relu counts them
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Which build of the library the tests of kernels take, when it is not the plain one.
SANITIZER = "CONVEXT_EMULATOR_SANITIZER"
# What each build finds is told by tests/cuda_emulation/emulator.h.
FLAGS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "race": ["-O1", "-DCONVEXT_EMULATOR_RACES"],
}


def compiler_command(sanitizer: str) -> list[str]:
    command = ["g++", "-std=c++20", "-fPIC", "-g1", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += ["-Wno-unknown-pragmas", "-Wno-class-memaccess", *FLAGS[sanitizer]]
    if platform.machine() in ("x86_64", "AMD64"):
        command += ["-mavx2", "-mfma", "-mf16c"]
    return [*command, f"-I{ROOT}/csrc", f"-I{EMULATION}", "-isystem", str(cuda_include())]


def compile_and_link(
    folder: Path, sources: list[Path], target: Path, sanitizer: str, shared: bool
) -> None:
    """Compile the emulator and `sources` and link them."""
    common = compiler_command(sanitizer)

    def compile_one(source: Path) -> Path:
        target = folder / (source.name + ".o")
        # Instrumented for races are the kernels alone: what they are told of is their accesses.
        instrument = sanitizer == "race" and source.suffix == ".cu"
        flags = ["-fsanitize=thread"] if instrument else []
        subprocess.run([*common, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    # The emulator comes first: of an inline function that both have, the linker takes its, which is
    # not instrumented.
    emulator = sorted(path for path in EMULATION.glob("*.cpp") if path != C_INTERFACE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*emulator, *sources]))
    sanitize = [flag for flag in FLAGS[sanitizer] if flag.startswith("-fsanitize")]
    kind = ["-shared"] if shared else []
    subprocess.run(["g++", *sanitize, *kind, *objects, "-o", target, "-lpthread"], check=True)


def build(folder: Path, sanitizer: str = "plain") -> Path:
    """Compile emulator and kernels to a shared library in `folder`.

    One for "address" loads only into a process that began with `sanitized_environment()`.
    """
    library = folder / "libcuda_kernels.so"
    sources = sorted((ROOT / "csrc/cuda/kernels").glob("*.c*"))
    sources.append(C_INTERFACE)
    compile_and_link(folder, sources, library, sanitizer, shared=True)
    return library


def build_probes(folder: Path, sanitizer: str = "plain") -> Path:
    """Compile emulator and tests/cuda_emulation/probes to a program in `folder`."""
    program = folder / "probes"
    compile_and_link(folder, PROBES, program, sanitizer, shared=False)
    return program


def sanitized_environment(sanitizer: str) -> dict[str, str]:
    """The environment of a process that loads the library of `build(folder, sanitizer)`."""
    environment = {**os.environ, SANITIZER: sanitizer}
    if sanitizer == "address":
        found = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            # With it the C++ library, whose functions that library looks up as it starts.
            for name in ("libasan.so", "libstdc++.so")
        ]
        environment["LD_PRELOAD"] = " ".join(found)
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's, at its end
    return environment


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t if t is None else t.data_ptr() for t in tensors))


def described(
    p: Conv2dProblem,
    conv_pass: str,
    dtype: torch.dtype,
    layout: str,
    tf32: bool,
    compute_capability: int,
) -> tuple:
    """A call without its operands, as the C functions take it."""
    sizes = (p.N, p.C, p.H, p.W, p.O, *p.kernel, *p.stride, *p.padding, *p.dilation, p.groups)
    return (
        PASSES.index(conv_pass),
        DTYPES.index(dtype),
        list(FORMATS).index(layout),
        (ctypes.c_int64 * len(sizes))(*sizes),
        tf32,
        compute_capability,
    )


class Epilogue(NamedTuple):
    """What a forward pass does to its results, besides the bias."""

    relu_before: bool = False
    shift: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    relu_after: bool = False

    def __call__(self, y: Tensor) -> Tensor:
        """By PyTorch."""
        if self.relu_before:
            y = y.relu()
        if self.scale is not None:
            shift, scale, offset = (
                t.to(y.dtype)[:, None, None] for t in (self.shift, self.scale, self.offset)
            )
            y = (y - shift) * scale + offset
        return y.relu() if self.relu_after else y


NO_EPILOGUE = Epilogue()


class Kernels:
    """The library, its functions taking tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.convext_cuda_algorithm.restype = ctypes.c_char_p
        self._c.convext_cuda_conv2d.restype = ctypes.c_char_p
        self._c.convext_cuda_auto.restype = ctypes.c_char_p
        self._c.convext_cuda_auto_row.restype = ctypes.c_char_p

    @cache  # noqa: B019, one object for the whole process
    def algorithms(self) -> tuple[str, ...]:
        count = self._c.convext_cuda_algorithm_count()
        return tuple(self._c.convext_cuda_algorithm(i).decode() for i in range(count))

    def conv2d(
        self,
        p: Conv2dProblem,
        conv_pass: str,
        data: Operands,
        algorithm: str,
        layout: str = "contiguous",
        tf32: bool = False,
        compute_capability: int = 90,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Tensor | str:
        """One pass, or the reason for which the algorithm declines."""
        format = FORMATS[layout]
        names = {
            "forward": ("input", "weight", "bias"),
            "grad_input": ("weight", "grad_output"),
            "grad_weight": ("input", "grad_output"),
        }[conv_pass]
        read = {}
        for name in names:
            tensor = getattr(data, name)
            if tensor is not None:
                read[name] = (
                    tensor.contiguous(memory_format=format) if tensor.dim() == 4 else tensor
                )
        size = {
            "forward": p.output_size,
            "grad_input": p.input_size,
            "grad_weight": p.weight_size,
        }[conv_pass]
        dtype = data.input.dtype
        output = torch.full(size, float("nan"), dtype=dtype).contiguous(memory_format=format)
        if output.numel() == 0:
            return output
        declined = self._c.convext_cuda_conv2d(
            algorithm.encode(),
            *described(p, conv_pass, dtype, layout, tf32, compute_capability),
            *(
                ctypes.c_void_p(read[name].data_ptr()) if name in read else None
                for name in ("input", "weight", "bias", "grad_output")
            ),
            ctypes.c_void_p(output.data_ptr()),
            epilogue.relu_before,
            pointers([epilogue.shift, epilogue.scale, epilogue.offset]),
            epilogue.relu_after,
        )
        return output if declined is None else declined.decode()

    def batch_norm(
        self,
        what: str,
        input: Tensor | None,
        grad_output: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        relu: str = "none",
        eps: float = 1e-5,
        layout: str = "contiguous",
    ) -> dict[str, Tensor]:
        """What one of BATCH_NORMS computes, by name, of tensors that lie as `layout` says."""
        like = grad_output if input is None else input
        channels, dtype = like.shape[1], like.dtype
        sums = torch.float64 if dtype == torch.float64 else torch.float32

        def empty() -> Tensor:
            return torch.full((channels,), float("nan"), dtype=sums)

        results = {}
        if what == "train":
            results = {"mean": empty(), "var": empty()}
            mean, var = results["mean"], results["var"]
        if what != "sum of a bias":
            output = torch.full(like.shape, float("nan"), dtype=dtype)
            results["output"] = output.contiguous(memory_format=FORMATS[layout])
        if what.startswith("backward"):
            results |= {"grad_weight": empty(), "grad_input_sum": empty()}
        if what not in ("train", "eval"):
            results["grad_bias"] = empty()
        arrays = [input, grad_output, weight, bias, mean, var]
        arrays += [results.get(n) for n in ("output", "grad_weight", "grad_bias", "grad_input_sum")]
        self._c.convext_cuda_batch_norm(
            BATCH_NORMS.index(what),
            RELUS.index(relu),
            DTYPES.index(dtype),
            list(FORMATS).index(layout),
            ctypes.c_double(eps),
            (ctypes.c_int64 * 3)(*like.shape[:2], like.shape[2:].numel()),
            pointers(arrays),
        )
        return results

    def conv_block(
        self,
        p: Conv2dProblem,
        data: Operands,
        norm: tuple[Tensor, Tensor, Tensor, Tensor],
        training: bool,
        relu: str,
        algorithm: str = "direct",
        layout: str = "contiguous",
        keep_activation: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and activation. `norm` is its weight, bias, mean and var, of which the last two
        are written in training.
        """
        format = FORMATS[layout]
        given = [t.contiguous(memory_format=format) for t in (data.input, data.weight)]
        output = torch.full(p.output_size, float("nan"), dtype=data.input.dtype)
        output = output.contiguous(memory_format=format)
        activation = torch.full_like(output, float("nan")) if keep_activation else None
        sizes = (p.N, p.C, p.H, p.W, p.O, *p.kernel, *p.stride, *p.padding, *p.dilation, p.groups)
        self._c.convext_cuda_conv_block(
            algorithm.encode(),
            training,
            RELUS.index(relu),
            DTYPES.index(output.dtype),
            list(FORMATS).index(layout),
            ctypes.c_double(1e-5),
            (ctypes.c_int64 * len(sizes))(*sizes),
            pointers([*given, data.bias, *norm, activation, output]),
        )
        return output, activation

    def auto(
        self,
        p: Conv2dProblem,
        conv_pass: str,
        dtype: torch.dtype,
        layout: str = "contiguous",
        tf32: bool = False,
        compute_capability: int = 90,
    ) -> tuple[str, str]:
        """What "auto" takes, and why."""
        reason = ctypes.c_char_p()
        call = described(p, conv_pass, dtype, layout, tf32, compute_capability)
        name = self._c.convext_cuda_auto(*call, ctypes.byref(reason))
        return name.decode(), reason.value.decode()

    def auto_rows(self) -> list[tuple[str, str]]:
        """Its table: algorithms, and reasons for them."""
        rows, reason = [], ctypes.c_char_p()
        while name := self._c.convext_cuda_auto_row(len(rows), ctypes.byref(reason)):
            rows.append((name.decode(), reason.value.decode()))
        return rows

    def merge_moments(self, partial: Tensor, part_rows: int, rows: int) -> tuple[Tensor, Tensor]:
        """Means and sums of squared deviations from those of the parts, [part][2][channel]."""
        channels = partial.shape[2]
        results = tuple(torch.full((channels,), float("nan"), dtype=partial.dtype) for _ in "12")
        self._c.convext_cuda_merge_moments(
            partial.dtype == torch.float64,
            *(ctypes.c_void_p(partial.data_ptr()), ctypes.c_int64(part_rows)),
            *(ctypes.c_int64(rows), ctypes.c_int64(channels)),
            *(ctypes.c_void_p(result.data_ptr()) for result in results),
        )
        return results
