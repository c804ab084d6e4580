"""A build without CUDA kernels: what it says of them."""

import pytest
import torch

import convext
from convext import _C

pytestmark = pytest.mark.skipif(
    _C.cuda_algorithms() is not None, reason="convext was built with CUDA"
)
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
OPS = torch.ops.convext


def ones(*sizes):
    return [torch.ones(size) for size in sizes]


SETTINGS = ([1, 1], [0, 0], [1, 1], 1)
CALLS = {
    "conv2d": (*ones((1, 1, 2, 2), (1, 1, 1, 1)), None, *SETTINGS),
    "conv2d_backward_input": (*ones((1, 1, 2, 2), (1, 1, 1, 1)), [1, 1, 2, 2], *SETTINGS),
    "conv2d_backward_weight": (*ones((1, 1, 2, 2), (1, 1, 2, 2)), [1, 1, 1, 1], *SETTINGS),
    "conv2d_backward_bias": ones((1, 1, 2, 2)),
    "batch_norm_train": (*ones((1, 1, 2, 2)), None, None, 1e-5),
    "batch_norm_eval": (*ones((1, 1, 2, 2), 1, 1), None, None, 1e-5),
    "batch_norm_backward": (*ones((1, 1, 2, 2), (1, 1, 2, 2), 1, 1), None, 1e-5, True),
    "conv_block_train": (
        *ones((1, 1, 2, 2), (1, 1, 1, 1)),
        *(None, None, None, *SETTINGS, 1e-5, "conv-relu-norm"),
    ),
    "conv_block_eval": (
        *ones((1, 1, 2, 2), (1, 1, 1, 1)),
        *(None, *ones(1, 1), None, None, *SETTINGS, 1e-5, "conv-relu-norm"),
    ),
    "conv_block_backward": (
        *ones((1, 1, 2, 2), (1, 1, 2, 2), 1, 1),
        *(None, None, 1e-5, True, "conv-relu-norm"),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_cuda_tensor_is_an_error_that_says_why(op):
    # As a CUDA tensor would come, of which there need not be one here.
    with pytest.raises(NotImplementedError, match=rf"{op}\(\): this build of convext has no CUDA"):
        getattr(OPS, op).default.redispatch(CUDA, *CALLS[op])


def test_every_op_is_among_them():
    names = {
        name.removeprefix("convext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("convext::")
    }
    assert names - {"update_running_statistics"} == set(CALLS)


def test_algorithms_of_a_device_without_kernels():
    with pytest.raises(ValueError, match="has kernels for 'cpu', not for 'cuda'"):
        convext.algorithms("cuda")
    with pytest.raises(ValueError, match="has kernels for 'cpu', not for 'mps'"):
        convext.algorithms("mps")
