"""Functional forms of the layers: `torch.nn.functional.conv2d` and `batch_norm` on our kernels.

Each normalises its arguments as PyTorch does and calls one op of `torch.ops.convext`; the ops check
what they are given (csrc/tensor_args.cpp).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from convext import _C, transforms
from convext.choice import permitted

_ops = torch.ops.convext
# The overloads themselves: there is no other to look for.
_conv2d = _ops.conv2d.default
_batch_norm_train = _ops.batch_norm_train.default
_batch_norm_eval = _ops.batch_norm_eval.default
_conv_block_train = _ops.conv_block_train.default
_conv_block_eval = _ops.conv_block_eval.default


def _is_eager() -> bool:
    """Whether plain calls may go by `convext._C`: a small layer's time is its bookkeeping.

    Those that are not plain come back as NotImplemented, to take the long way (csrc/eager_call.h).
    """
    return not (transforms.active() or torch.compiler.is_compiling())


def _pair(name: str, value: int | tuple[int, ...] | list[int]) -> tuple[int, ...] | list[int]:
    if type(value) is int:
        return (value, value)
    values = value if isinstance(value, (tuple, list)) else (value,)
    for number in values:
        if type(number) is not int and not hasattr(number, "__index__"):  # SymInt, numpy's integers
            raise TypeError(f"conv2d(): {name} must be an int or a pair of ints, got {value!r}")
    return values if len(values) != 1 else (values[0], values[0])


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """Two-dimensional cross-correlation, as `torch.nn.functional.conv2d`.

    Args:
        input: (N, in_channels, H, W), or (in_channels, H, W) for a single image; float32, float64,
            bfloat16 or float16, contiguous, channels_last or any strides.
        weight: (out_channels, in_channels / groups, kH, kW), of input's dtype.
        bias: (out_channels), of input's dtype, or None.
        stride, padding, dilation: an int for both axes or (height, width). padding may be "valid"
            (none) or "same" (output as large as input; as in PyTorch for stride 1 only, and where
            the total is odd the extra zero goes to the bottom and the right).
        groups: blocks of connections between input and output channels.
        algorithm: "auto", or one of `convext.algorithms()`, also used for the gradients. "auto"
            decides by the problem alone, unless `convext.autotune` has it measure, and without
            Winograd's algorithms, unless `convext.allow_winograd` allows them.

    Sums are accumulated in float32, or in float64 where input is. On the CPU nothing is rounded to
    less on the way, whatever `torch.backends` allows with its `fp32_precision` flags. On CUDA the
    factors of float32 products may be rounded to TF32 (10 bits of mantissa) where PyTorch's own
    convolutions may: `torch.backends.cudnn.conv.fp32_precision = "ieee"` keeps them exact, "tf32"
    lets them be rounded, and so does PyTorch's default (`torch.backends.cudnn.allow_tf32`).

    Returns:
        (N, out_channels, out_H, out_W), or without N where input has none, with
        out = floor((in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1) on each axis; in
        channels_last where input or weight is.

    Raises:
        RuntimeError: sizes, dtypes, devices or settings that do not fit; named in the message.
        TypeError: an argument of another Python type.
        ValueError: an unknown algorithm, or one that cannot do this problem.
    """
    algorithm_of_op = permitted(algorithm)
    if _is_eager():
        output = _C.conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm_of_op)
        if output is not NotImplemented:
            return output
    arguments = _conv2d_arguments(input, weight, bias, stride, padding, dilation, groups)
    if arguments is None:
        operands, settings = (input, weight, bias), (stride, padding, dilation, groups)
        return handle_torch_function(conv2d, operands, *operands, *settings, algorithm=algorithm)
    input, stride, padding, dilation, unbatched = arguments
    op = transforms.conv2d if transforms.active() else _conv2d
    output = op(input, weight, bias, stride, padding, dilation, groups, algorithm_of_op)
    return output.squeeze(0) if unbatched else output


def _conv2d_arguments(input, weight, bias, stride, padding, dilation, groups) -> tuple | None:
    """(input, stride, padding, dilation) as the ops take them, and whether input had no N.

    None where an operand is no tensor but has a `__torch_function__`, as torch.fx's Proxy has.
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)) or not (
        bias is None or isinstance(bias, Tensor)
    ):
        if has_torch_function((input, weight, bias)):
            return None
        _refuse_non_tensors(input=input, weight=weight, bias=bias)
    if type(groups) is not int and not hasattr(groups, "__index__"):
        raise TypeError(f"conv2d(): groups must be an int, got {groups!r}")
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
    elif input.dim() != 4:
        raise RuntimeError(
            "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: "
            f"{list(input.shape)}"
        )
    if isinstance(padding, str):
        input, padding = _pad_by_name(input, weight, stride, padding, dilation)
    else:
        padding = _pair("padding", padding)
    return input, stride, padding, dilation, unbatched


def _refuse_non_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (name != "bias" or value is not None):
            raise TypeError(f"conv2d(): {name} must be a Tensor, got {type(value).__name__}")


def _pad_by_name(
    input: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Resolve "same" and "valid" to numbers, padding input where the two sides differ."""
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: {padding!r}; expected 'same' or 'valid'")
    if any(s != 1 for s in stride):
        raise RuntimeError(
            f"padding='same' is not supported for strided convolutions, got stride {list(stride)}"
        )
    if weight.dim() != 4 or len(dilation) != 2:
        return input, [0, 0]  # which the op refuses
    total = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, [0, total[1] % 2, 0, total[0] % 2])
    return input, [t // 2 for t in total]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalization (Ioffe and Szegedy, 2015), as `torch.nn.functional.batch_norm`.

    Every channel is shifted and scaled to mean 0 and variance 1, over all other axes of the batch
    in training and by the running statistics otherwise, then multiplied by weight and shifted by
    bias.

    Args:
        input: (N, C, *) of float32, float64, bfloat16 or float16.
        running_mean, running_var: (C), or None in training to keep none. In training they are
            updated in place: running = (1 - momentum) * running + momentum * batch, with the
            unbiased variance.
        weight, bias: (C), of input's dtype or float32, or None for 1 and 0.
        training: normalise by the batch's own mean and biased variance.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        A tensor of input's shape, dtype and memory format.

    Raises:
        ValueError: training on a single value per channel.
        RuntimeError: no running statistics outside training, or running statistics that require
            a gradient; sizes, dtypes or devices that do not fit.
    """
    if _is_eager():
        output = _C.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if output is not NotImplemented:
            return output
    if not isinstance(input, Tensor):
        if not has_torch_function((input,)):
            raise TypeError(f"batch_norm(): input must be a Tensor, got {type(input).__name__}")
        statistics = (running_mean, running_var)
        return handle_torch_function(
            batch_norm, (input,), input, *statistics, weight, bias, training, momentum, eps
        )
    if input.dim() == 1 and input.numel() == 0:
        return input.clone()  # PyTorch takes whatever is empty
    _refuse_gradients(running_mean, running_var)
    _check_running_statistics(running_mean, running_var, training, input.shape[1:2])
    transformed = transforms.active()
    if not training:
        op = transforms.batch_norm_eval if transformed else _batch_norm_eval
        return op(input, running_mean, running_var, weight, bias, eps)
    op = transforms.batch_norm_train if transformed else _batch_norm_train
    output, mean, var = op(input, weight, bias, eps)
    _update_running_statistics(running_mean, running_var, mean, var, output, momentum)
    return output


def _refuse_gradients(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    by_mean = running_mean is not None and running_mean.requires_grad
    by_var = running_var is not None and running_var.requires_grad
    if (by_mean or by_var) and torch.is_grad_enabled():
        name = "running_mean" if by_mean else "running_var"
        raise RuntimeError(f"batch_norm(): not differentiable with respect to {name}")


def _check_running_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, size: torch.Size
) -> None:
    """What the ops, which see no running statistics in training, don't check.

    size: (C,), or empty where a tensor has too few axes, which the ops say.
    """
    if training:
        for name, running in (("running_mean", running_mean), ("running_var", running_var)):
            if running is not None and len(size) == 1 and running.shape != size:
                raise RuntimeError(
                    f"batch_norm(): {name} should contain {size[0]} elements, one for each "
                    f"channel, got size {list(running.shape)}"
                )
    elif running_mean is None or running_var is None:
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when training=False, got "
            f"running_mean={running_mean}, running_var={running_var}"
        )


def _update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    normalized: Tensor,
    momentum: float,
) -> None:
    """Takes a batch's mean and biased variance into the running statistics, in place."""
    # Of an empty batch there is nothing to learn.
    if normalized.numel() == 0 or (running_mean is None and running_var is None):
        return
    count = normalized.numel() // normalized.size(1)
    update = transforms.update_statistics if transforms.active() else transforms.update_in_place
    update(running_mean, running_var, mean, var, momentum, count)


def conv_block(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    order: str = "conv-relu-norm",
    algorithm: str = "auto",
) -> Tensor:
    """`conv2d`, ReLU and `batch_norm` as one operation with one node of the autograd graph.

    Equal to the three called one after another, within rounding. In training the convolution sums
    the statistics up while its results are in cache; in evaluation without gradients all is one
    pass. The backward pass of norm and ReLU is one, and gives the gradient of `bias` as well.
    Under torch.func and forward-mode differentiation, which know no fused node, it is the three.

    Args:
        input, weight, bias, stride, padding, dilation, groups, algorithm: as in `conv2d`.
        running_mean, running_var, training, momentum, eps: as in `batch_norm`.
        norm_weight, norm_bias: (out_channels), batch norm's weight and bias.
        order: "conv-relu-norm" (as in the fastai book) or "conv-norm-relu" (Ioffe and Szegedy,
            2015).

    Returns:
        (N, out_channels, out_H, out_W), or without N where input has none.

    Raises:
        ValueError: an unknown order, and what `batch_norm` raises it for.
        RuntimeError, TypeError: as `conv2d` and `batch_norm`.
    """
    algorithm_of_op = permitted(algorithm)
    if _is_eager():
        output = _C.conv_block(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            norm_weight,
            norm_bias,
            stride,
            padding,
            dilation,
            groups,
            training,
            momentum,
            eps,
            order,
            algorithm_of_op,
        )
        if output is not NotImplemented:
            return output
    if transforms.active():
        return conv_block_in_parts(
            conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm=algorithm),
            order,
            lambda x: batch_norm(
                x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
            ),
        )
    arguments = _conv2d_arguments(input, weight, bias, stride, padding, dilation, groups)
    if arguments is None:
        operands = (input, weight, bias)
        norm_operands = (running_mean, running_var, norm_weight, norm_bias)
        return handle_torch_function(
            conv_block,
            operands,
            *operands,
            *norm_operands,
            stride,
            padding,
            dilation,
            groups,
            training=training,
            momentum=momentum,
            eps=eps,
            order=order,
            algorithm=algorithm,
        )
    input, stride, padding, dilation, unbatched = arguments
    _refuse_gradients(running_mean, running_var)
    _check_running_statistics(running_mean, running_var, training, weight.shape[:1])
    settings = (stride, padding, dilation, groups, eps, order)
    if training:
        output, _, mean, var = _conv_block_train(
            input, weight, bias, norm_weight, norm_bias, *settings, algorithm_of_op
        )
        _update_running_statistics(running_mean, running_var, mean, var, output, momentum)
    else:
        output, _ = _conv_block_eval(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            norm_weight,
            norm_bias,
            *settings,
            False,  # autograd keeps the activation where it needs it
            algorithm_of_op,
        )
    return output.squeeze(0) if unbatched else output


def conv_block_in_parts(
    convolved: Tensor, order: str, normalize: Callable[[Tensor], Tensor]
) -> Tensor:
    """A block from its convolution's result on, in separate operations."""
    unbatched = convolved.dim() == 3
    if unbatched:
        convolved = convolved.unsqueeze(0)
    if order == "conv-relu-norm":
        output = normalize(F.relu(convolved))
    elif order == "conv-norm-relu":
        output = F.relu(normalize(convolved))
    else:
        raise ValueError(
            f'conv_block(): order must be "conv-relu-norm" or "conv-norm-relu", got {order!r}'
        )
    return output.squeeze(0) if unbatched else output
