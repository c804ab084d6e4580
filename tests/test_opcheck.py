"""What PyTorch asks of an op: `torch.library.opcheck`, every utility, over the list of problems.

Schemas (nothing mutated, nothing aliased), autograd registration and fake kernels (shape, dtype and
strides) are checked on every problem. Tracing with symbolic sizes and a backward takes a hundred
times as long, and is checked on one problem of each kind.
"""

import pytest
import torch
from problems import PROBLEMS, named
from torch.library import opcheck

ops = torch.ops.convext
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
LAYOUTS = {
    "contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}


def values(size, layout, dtype=torch.float32, device="cpu", requires_grad=True):
    tensor = torch.randn(size, dtype=dtype, device=device)
    if len(size) in LAYOUTS[layout]:
        tensor = tensor.contiguous(memory_format=LAYOUTS[layout][len(size)])
    return tensor.requires_grad_(requires_grad)


def conv2d_calls(problem, layout, **kind):
    x, w, b, g = (
        values(size, layout, **kind)
        for size in (
            problem.input_size,
            problem.weight_size,
            problem.weight_size[:1],
            problem.output_size,
        )
    )
    tail = (*problem.settings, "auto")
    return [
        (ops.conv2d, (x, w, b, *tail)),
        (ops.conv2d, (x, w, None, *tail)),
        (ops.conv2d_backward_input, (g, w, problem.input_size, *tail)),
        (ops.conv2d_backward_weight, (g, x, problem.weight_size, *tail)),
        (ops.conv2d_backward_bias, (g,)),
    ]


def batch_norm_calls(size, layout, affine=True, wide=False, **kind):
    """wide: parameters of float32 beside an input of 16 bits."""
    x, g = (values(size, layout, **kind) for _ in range(2))
    per_channel = {**kind, "dtype": torch.float32} if wide else kind
    w, b = (values(size[1:2], layout, **per_channel) if affine else None for _ in range(2))
    per_channel = {**per_channel, "requires_grad": False}
    mean, var = (values(size[1:2], layout, **per_channel).abs() + 0.5 for _ in range(2))
    calls = [
        (ops.batch_norm_eval, (x, mean, var, w, b, 1e-5)),
        (ops.batch_norm_backward, (g, x, mean, var, w, 1e-5, True)),
        (ops.batch_norm_backward, (g, x, mean, var, w, 1e-5, False)),
    ]
    if x.numel() != size[1]:  # refused: one value per channel
        calls.append((ops.batch_norm_train, (x, w, b, 1e-5)))
    running = (mean.clone(), var.clone())
    calls += [
        (ops.update_running_statistics, (*kept, mean, var, 0.1, 0.2))
        for kept in (running, (running[0], None), (None, running[1]))
    ]
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_problem(problem, layout, device):
    calls = conv2d_calls(problem, layout, device=device)
    calls += batch_norm_calls(problem.output_size, layout, device=device)
    for op, arguments in calls:
        opcheck(op.default, arguments, test_utils=QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, device):
    for layout in LAYOUTS:
        calls = conv2d_calls(named("all settings differ"), layout, dtype=dtype, device=device)
        for wide in {False, dtype not in (torch.float64, torch.float32)}:
            calls += batch_norm_calls((2, 5, 3, 4), layout, wide=wide, dtype=dtype, device=device)
        for op, arguments in calls:
            opcheck(op.default, arguments, test_utils=QUICK)


@pytest.mark.parametrize(
    ("name", "layout", "requires_grad"),
    [
        ("plain", "channels_last", False),
        ("all settings differ", "contiguous", True),
        ("depthwise", "channels_last", True),
        ("batch of none", "contiguous", True),
    ],
)
def test_conv2d_with_every_utility(name, layout, requires_grad, device):
    calls = conv2d_calls(named(name), layout, device=device, requires_grad=requires_grad)
    for op, arguments in calls:
        opcheck(op.default, arguments)


@pytest.mark.parametrize(
    ("size", "layout", "affine"),
    [
        ((3, 2), "contiguous", True),
        ((2, 3, 4, 5), "contiguous", False),
        ((2, 3, 2, 2, 3), "channels_last", True),
    ],
)
def test_batch_norm_with_every_utility(size, layout, affine, device):
    for op, arguments in batch_norm_calls(size, layout, affine, device=device):
        opcheck(op.default, arguments)
