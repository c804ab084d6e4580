"""Division by multiplication, in csrc/cuda/kernels/fast_divisor.h."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_quotients(tmp_path):
    program = tmp_path / "fast_divisor"
    source = ROOT / "tests/fast_divisor.cpp"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover", f"-I{ROOT}/csrc"]
    subprocess.run(["g++", *flags, source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
