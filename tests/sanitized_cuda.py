"""Runs tests of the emulated CUDA kernels on a build that finds what the plain one does not.

`python tests/sanitized_cuda.py race|address PYTEST_ARGUMENTS...`; what each finds is told by
tests/cuda_emulation/emulator.h.
"""

import os
import sys

from emulated_cuda import FLAGS, sanitized_environment

if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
    sys.exit(__doc__)
command = [sys.executable, "-m", "pytest", *sys.argv[2:]]
os.execve(sys.executable, command, sanitized_environment(sys.argv[1]))
