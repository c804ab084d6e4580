"""What `torch.utils.flop_counter.FlopCounterMode` counts for our ops.

A convolution and both of its derivatives multiply the same pairs of numbers and differ in what they
sum: one multiplication and one addition for each output element, each input channel of its group
and each tap. As for PyTorch's ops, taps in the padding count, and biases and batch norm don't.
PyTorch's formula for grad_weight forgets that channels come in groups; here groups are counted.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.convext


def _count(output_size: torch.Size, weight_size: torch.Size) -> int:
    return 2 * output_size[0] * prod(output_size[2:]) * prod(weight_size)


@register_flop_formula(_ops.conv2d)
def _(input, weight, *arguments, out_shape, **named) -> int:
    return _count(out_shape, weight)


@register_flop_formula([_ops.conv_block_train, _ops.conv_block_eval])
def _(input, weight, *arguments, out_shape, **named) -> int:
    return _count(out_shape[0], weight)


@register_flop_formula(_ops.conv2d_backward_input)
def _(grad_output, weight, *arguments, out_shape, **named) -> int:
    return _count(grad_output, weight)


@register_flop_formula(_ops.conv2d_backward_weight)
def _(grad_output, input, *arguments, out_shape, **named) -> int:
    return _count(grad_output, out_shape)
