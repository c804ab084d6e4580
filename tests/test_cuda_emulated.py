"""The CUDA kernels, by the emulator, on the CPU kernels' problems."""

import pytest
from emulated_cuda import FORMATS
from problems import PROBLEMS
from reference import FLOATS, HALVES, PASSES, declines, expected, operands

ALGORITHMS = ("direct", "depthwise", "im2col", "implicit_gemm")


@pytest.mark.parametrize("cuda_algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_torch(kernels, problem, conv_pass, dtype, layout, cuda_algorithm):
    data = operands(problem, dtype)
    result = kernels.conv2d(problem, conv_pass, data, cuda_algorithm, layout)
    if declines(cuda_algorithm, problem):
        assert isinstance(result, str) or result.numel() == 0
        return
    assert not isinstance(result, str), result
    expected(problem, conv_pass, dtype, cuda_algorithm).check(result)
