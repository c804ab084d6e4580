"""Prints what the emulated CUDA kernels compute, as a table of digests.

`python tests/emulated_bits.py LIBRARY ALGORITHM PROBLEM...`, run by test_cuda_emulated.py in
processes of their own, for the emulator reads its schedule from the environment.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import torch
from emulated_cuda import FORMATS, Kernels
from problems import named
from reference import PASSES, operands


def digests(kernels: Kernels, algorithm: str, names: list[str]) -> dict[str, str]:
    """Of every pass and layout, by its words."""
    table = {}
    for name in names:
        for conv_pass in PASSES:
            for layout in FORMATS:
                data = operands(named(name), torch.float32)
                result = kernels.conv2d(named(name), conv_pass, data, algorithm, layout)
                content = result.contiguous().numpy().tobytes()
                table[f"{name}, {conv_pass}, {layout}"] = sha256(content).hexdigest()
    return table


if __name__ == "__main__":
    library, algorithm, *names = sys.argv[1:]
    print(json.dumps(digests(Kernels(Path(library)), algorithm, names)))
