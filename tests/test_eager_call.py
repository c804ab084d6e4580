"""The way from Python to the convolution past torch.ops: the op itself, or NotImplemented.

For batch norm and the block, see test_eager_norm.py.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from convext import _C
from convext.functional import conv2d

OP = torch.ops.convext.conv2d.default


def arguments(**changed) -> list:
    torch.manual_seed(0)
    named = {
        "input": torch.randn(2, 4, 6, 5),
        "weight": torch.randn(6, 2, 3, 2),
        "bias": torch.randn(6),
        "stride": 2,
        "padding": 1,
        "dilation": 1,
        "groups": 2,
        "algorithm": "auto",
    }
    return list((named | changed).values())


@pytest.mark.parametrize("bias", [None, torch.ones(6)], ids=["no bias", "bias"])
def test_is_the_op(bias, algorithm):
    operands = arguments(bias=bias, algorithm=algorithm)
    assert torch.equal(_C.conv2d(*operands), OP(*operands))


def test_takes_pairs():
    assert torch.equal(
        _C.conv2d(*arguments(stride=(1, 2), padding=(2, 0), dilation=(2, 1))),
        OP(*arguments(stride=[1, 2], padding=[2, 0], dilation=[2, 1])),
    )


def test_is_differentiated():
    operands = arguments(weight=torch.nn.Parameter(torch.randn(6, 2, 3, 2)))
    grads = []
    for call in (_C.conv2d, OP):
        output = call(*operands)
        assert type(output.grad_fn).__name__ == type(OP(*operands).grad_fn).__name__
        grads += torch.autograd.grad(output.sum(), operands[1])
    assert torch.equal(*grads)
    with torch.no_grad():
        assert not _C.conv2d(*operands).requires_grad
    with torch.inference_mode():
        assert _C.conv2d(*operands).is_inference()


class Subclass(torch.Tensor):
    pass


class Index:
    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "changed",
    [
        {"input": Subclass(torch.randn(2, 4, 6, 5))},
        {"weight": [1]},
        {"bias": 0},
        {"stride": [1, 1]},
        {"stride": (1,)},
        {"padding": (1, 1.0)},
        {"dilation": (1, 1 << 64)},
        {"input": torch.randn(4, 6, 5)},
        {"stride": 1.0},
        {"padding": "same"},
        {"dilation": True},
        {"groups": Index()},
        {"stride": 1 << 64},
        {"algorithm": None},
    ],
    ids=lambda changed: f"{next(iter(changed))} of {type(next(iter(changed.values()))).__name__}",
)
def test_leaves_what_is_not_plain_to_the_op(changed):
    assert _C.conv2d(*arguments(**changed)) is NotImplemented


def test_leaves_another_number_of_arguments_to_the_op():
    assert _C.conv2d() is NotImplemented
    assert _C.conv2d(*arguments(), 1) is NotImplemented


@pytest.mark.parametrize(
    "changed",
    [
        {"algorithm": "none"},
        {"stride": 0},
        {"padding": -1},
        {"groups": 3},
        {"stride": (1, 0)},
        {"input": torch.ones(2, 4, 6, 5, dtype=torch.int32)},
        {"weight": torch.randn(6, 2, 9, 9)},
        {"bias": torch.randn(5)},
        {"bias": torch.randn(6, dtype=torch.float64)},
        {"weight": torch.randn(6, 2, 3, 2).to_sparse()},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_raises_what_the_op_raises(changed):
    errors = []
    for call in (_C.conv2d, OP):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
            call(*arguments(**changed))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_modes_see_the_op():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch(), Function()):
        with mode:
            conv2d(*arguments()[:7])
        assert OP in seen
        seen.clear()


def test_tracing_sees_the_op():
    input, weight = arguments()[:2]
    traced = torch.jit.trace(lambda x: conv2d(x, weight, groups=2), input)
    assert "convext::conv2d" in str(traced.graph)
