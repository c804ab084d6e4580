"""Shape functions of the ops: what torch.compile and torch.export run in place of a kernel.

Sizes may be symbolic. Every result has the very dtype and memory format that the kernel returns;
`torch.library.opcheck` compares them in tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format  # the C++ method has no public twin


def _common_memory_format(*tensors: Tensor) -> torch.memory_format:
    """The rule of csrc/tensor_args.cpp: channels_last when any of the tensors is."""
    formats = (suggest_memory_format(tensor) for tensor in tensors)
    return next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)


def _empty(
    size: Sequence[int],
    like: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty(
        size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format
    )


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    """Meta tensors come here too, and so do real ones beside them."""
    devices = {tensor.device for tensor in (input, *others) if tensor is not None}
    torch._check(
        len(devices) == 1, lambda: f"expected all tensors on the same device, got {devices}"
    )


def _check_types(*tensors: Tensor) -> None:
    types = {tensor.dtype for tensor in tensors}
    torch._check(len(types) == 1, lambda: f"tensor types should be the same, got {types}")


def _conv2d_output_size(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """The size, once all is refused that csrc/tensor_args.cpp refuses in real tensors."""
    torch._check(
        len(input_size) == 4 and len(weight_size) == 4,
        lambda: f"conv2d(): expected 4D input and weight, got {input_size} and {weight_size}",
    )
    for name, pair, least in (
        ("non-positive stride", stride, 1),
        ("negative padding", padding, 0),
        ("non-positive dilation", dilation, 1),
    ):
        torch._check(
            len(pair) == 2 and min(pair) >= least,
            lambda name=name, pair=pair: f"conv2d(): {name} is not supported, got {list(pair)}",
        )
    torch._check(groups > 0, lambda: f"conv2d(): non-positive groups is not supported: {groups}")
    torch._check(
        weight_size[0] % groups == 0,
        lambda: (
            f"conv2d(): Given groups={groups}, expected weight to have output channels divisible "
            f"by it, but got weight of size {list(weight_size)}"
        ),
    )
    torch._check(
        input_size[1] == weight_size[1] * groups,
        lambda: (
            f"conv2d(): Given groups={groups}, weight of size {list(weight_size)}, expected input "
            f"{list(input_size)} to have {weight_size[1] * groups} channels"
        ),
    )
    size = [input_size[0], weight_size[0]]
    for i, k, s, p, d in zip(
        input_size[2:], weight_size[2:], stride, padding, dilation, strict=True
    ):
        room = i + 2 * p - d * (k - 1) - 1
        torch._check(
            room >= 0,
            lambda: (
                "conv2d(): Kernel size can't be greater than actual input size: input "
                f"{list(input_size)}, weight {list(weight_size)}, padding {list(padding)}, "
                f"dilation {list(dilation)}"
            ),
        )
        size.append(room // s + 1)
    return size


def _empty_conv2d(input, weight, bias, *settings) -> Tensor:
    _check_types(input, weight, *([] if bias is None else [bias]))
    size = _conv2d_output_size(input.shape, weight.shape, *settings)
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == size[1],
            lambda: f"conv2d(): expected bias of size [{size[1]}], got {list(bias.shape)}",
        )
    return _empty(size, input, _common_memory_format(input, weight))


@torch.library.register_fake("convext::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, algorithm="auto"):
    _check_devices(input, weight, bias)
    return _empty_conv2d(input, weight, bias, stride, padding, dilation, groups)


@torch.library.register_fake("convext::conv2d_backward_input")
def _(grad_output, weight, input_size, stride, padding, dilation, groups, algorithm="auto"):
    _check_devices(grad_output, weight)
    _check_types(grad_output, weight)
    _conv2d_output_size(input_size, weight.shape, stride, padding, dilation, groups)
    return _empty(input_size, grad_output, _common_memory_format(grad_output, weight))


@torch.library.register_fake("convext::conv2d_backward_weight")
def _(grad_output, input, weight_size, stride, padding, dilation, groups, algorithm="auto"):
    _check_devices(grad_output, input)
    _check_types(grad_output, input)
    _conv2d_output_size(input.shape, weight_size, stride, padding, dilation, groups)
    return _empty(weight_size, grad_output, _common_memory_format(grad_output, input))


@torch.library.register_fake("convext::conv2d_backward_bias")
def _(grad_output):
    return _empty([grad_output.shape[1]], grad_output)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels add up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_channels(channels: int, *values: Tensor | None) -> None:
    for tensor in values:
        torch._check(
            tensor is None or (tensor.dim() == 1 and tensor.shape[0] == channels),
            lambda tensor=tensor: (
                f"expected a value for each of {channels} channels, got size {list(tensor.shape)}"
            ),
        )


@torch.library.register_fake("convext::batch_norm_train")
def _(input, weight, bias, eps):
    _check_devices(input, weight, bias)
    _check_channels(input.shape[1], weight, bias)
    output = _empty(input.shape, input, suggest_memory_format(input))
    mean, var = (_empty([input.shape[1]], input, dtype=_sum_dtype(input.dtype)) for _ in range(2))
    return output, mean, var


@torch.library.register_fake("convext::batch_norm_eval")
def _(input, mean, var, weight, bias, eps):
    _check_devices(input, mean, var, weight, bias)
    _check_channels(input.shape[1], mean, var, weight, bias)
    return _empty(input.shape, input, suggest_memory_format(input))


@torch.library.register_fake("convext::batch_norm_backward")
def _(grad_output, input, mean, var, weight, eps, training):
    _check_devices(input, grad_output, mean, var, weight)
    _check_channels(input.shape[1], mean, var, weight)
    grad_input = _empty(input.shape, input, suggest_memory_format(input))
    dtype = _sum_dtype(input.dtype) if weight is None else weight.dtype
    grad_weight, grad_bias = (_empty([input.shape[1]], input, dtype=dtype) for _ in range(2))
    return grad_input, grad_weight, grad_bias


@torch.library.register_fake("convext::conv_block_train")
def _(
    input,
    weight,
    bias,
    norm_weight,
    norm_bias,
    stride,
    padding,
    dilation,
    groups,
    eps,
    order,
    algorithm="auto",
):
    _check_devices(input, weight, bias, norm_weight, norm_bias)
    _check_channels(weight.shape[0], norm_weight, norm_bias)
    output = _empty_conv2d(input, weight, bias, stride, padding, dilation, groups)
    mean, var = (_empty([weight.shape[0]], input, dtype=_sum_dtype(input.dtype)) for _ in range(2))
    return output, torch.empty_like(output), mean, var


@torch.library.register_fake("convext::conv_block_eval")
def _(
    input,
    weight,
    bias,
    mean,
    var,
    norm_weight,
    norm_bias,
    stride,
    padding,
    dilation,
    groups,
    eps,
    order,
    keep_activation=False,
    algorithm="auto",
):
    _check_devices(input, weight, bias, mean, var, norm_weight, norm_bias)
    _check_channels(weight.shape[0], mean, var, norm_weight, norm_bias)
    output = _empty_conv2d(input, weight, bias, stride, padding, dilation, groups)
    activation = torch.empty_like(output) if keep_activation else _empty([0], input)
    return output, activation


@torch.library.register_fake("convext::conv_block_backward")
def _(grad_output, activation, mean, var, norm_weight, norm_bias, eps, training, order):
    _check_devices(activation, grad_output, mean, var, norm_weight, norm_bias)
    grad_conv = _empty(activation.shape, activation, suggest_memory_format(activation))
    sums = (
        _empty([activation.shape[1]], activation, dtype=_sum_dtype(activation.dtype))
        for _ in range(3)
    )
    return grad_conv, *sums
