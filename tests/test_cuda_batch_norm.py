"""Batch norm, sums of channels and the fused block on CUDA, by the emulator, against PyTorch."""

import pytest
import torch
from emulated_cuda import Kernels, build


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Kernels:
    return Kernels(build(tmp_path_factory.mktemp("cuda_emulated")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_parts_are_moments_of_all(kernels, dtype):
    for rows, part_rows, channels in [
        (1, 4, 1), (8, 4, 8), (9, 4, 9), (700, 1, 7), (3000, 3, 17), (500, 600, 70),
    ]:  # fmt: skip
        x = (torch.randn(rows, channels) * 2 + 5).to(dtype)
        parts = x.split(part_rows)
        partial = torch.stack(
            [torch.stack([p.mean(0), p.var(0, correction=0) * len(p)]) for p in parts]
        )
        mean, deviation = (
            result.double() for result in kernels.merge_moments(partial, part_rows, rows)
        )
        expected = x.double().mean(0), x.double().var(0, correction=0) * rows
        # The parts' means are rounded too.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mean, expected[0], rtol=4 * eps, atol=0)
        torch.testing.assert_close(deviation, expected[1], rtol=32 * eps, atol=64 * eps)
