"""Convolves operands that end where readable memory does: reading past one ends the process.

`python tests/guarded_operands.py`, run by test_memory.py in a process of its own.
"""

import ctypes
import faulthandler
import mmap

import torch
from problems import PROBLEMS
from reference import PASSES, Operands, convext_pass, declines, operands

import convext

PROT_NONE = 0
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte lies before a page that may not be read."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    if libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memoryview(memory)[pages - size : pages], dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def main() -> None:
    faulthandler.enable()
    calls = 0
    for isa in convext._C.cpu_isas():
        convext._C.set_cpu_isa(isa)
        for problem in PROBLEMS:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x, w, b, g = operands(problem, torch.float32)
                x, w, g = (t.contiguous(memory_format=memory_format) for t in (x, w, g))
                data = Operands(*map(guarded, (x, w, b, g)))
                for algorithm in convext.algorithms():
                    if declines(algorithm, problem):
                        continue
                    for conv_pass in PASSES:
                        convext_pass(problem, conv_pass, data, algorithm)
                        calls += 1
    print(calls)


if __name__ == "__main__":
    main()
