"""What each operation joins: a linear map with positive weights for every operation on a tape.

An output cell of `spread(step)` is above 0 exactly where it joins an input cell that is, whatever
the operation does with values. Its transpose, by autograd, goes from outputs to inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import convext
from convext.inspection import kinds
from convext.inspection.step import Ref, Step

Spread = Callable[..., Tensor]


def spread(step: Step) -> Spread:
    """The map of one step, from float64 tensors for its inputs, each once, to its output.

    Raises:
        NotImplementedError: an operation that is not known here.
    """
    if is_pointwise(step):
        return lambda *sources: _pointwise(step, *sources)
    for rule, its_kinds in _RULES.items():
        if step.kind in its_kinds:
            return lambda *sources: rule(step, *sources)
    raise NotImplementedError(
        f"{step.name}: which cells {step.op} reads is not known here; "
        "convext/inspection/spread.py lists the operations that are"
    )


def is_pointwise(step: Step) -> bool:
    """Whether each output cell reads the cells at its own place and no others."""
    return step.kind in _POINTWISE or torch.Tag.pointwise in step.op.tags


def _pointwise(step: Step, *sources: Tensor) -> Tensor:
    """Each cell by itself; a smaller input is repeated, as PyTorch broadcasts."""
    return sum(source.expand(step.value.shape) for source in sources)


def _movement(step: Step, *sources: Tensor) -> Tensor:
    """The operation itself: it moves cells about, or adds them up with positive weights."""
    output = step.op(*_filled(step, sources), **step.options)
    return output[step.part] if isinstance(output, (tuple, list)) else output


def _convolution(step: Step, source: Tensor) -> Tensor:
    """Every weight is 1."""
    arguments = step.named_arguments()
    weight = torch.ones_like(arguments["weight"], dtype=torch.float64, device="cpu")
    settings = [arguments[name] for name in ("stride", "padding", "dilation")]
    if weight.dim() == 4 and not arguments.get("transposed", False):
        return convext.functional.conv2d(source, weight, None, *settings, arguments["groups"])
    arguments |= {"input": source, "weight": weight, "bias": None}
    return torch.ops.aten.convolution.default(
        *(arguments[a.name] for a in torch.ops.aten.convolution.default._schema.arguments)
    )


def _pool(step: Step, source: Tensor) -> Tensor:
    """A maximum or mean of a window depends on all of it: a sum over the window."""
    arguments = step.named_arguments()
    kernel = _pair(arguments["kernel_size"])
    stride = _pair(arguments["stride"] or kernel)
    padding, dilation = _pair(arguments["padding"]), _pair(arguments.get("dilation", 1))
    *_, height, width = source.shape
    # ceil_mode's last window may end beyond the padding.
    ends = [
        max(0, (out - 1) * s + d * (k - 1) + 1 - size - p)
        for out, s, d, k, size, p in zip(
            step.value.shape[-2:], stride, dilation, kernel, (height, width), padding, strict=True
        )
    ]
    padded = F.pad(source, (padding[1], ends[1], padding[0], ends[0]))
    planes = padded.reshape(-1, 1, *padded.shape[-2:])
    ones = torch.ones(1, 1, *kernel, dtype=torch.float64)
    sums = convext.functional.conv2d(planes, ones, None, stride, 0, dilation)
    height, width = step.value.shape[-2:]
    return sums[..., :height, :width].reshape(step.value.shape)


def _adaptive_pool(step: Step, source: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(source, step.value.shape[-2:])


def _reduction(step: Step, source: Tensor) -> Tensor:
    """A mean, sum or maximum over some axes, or over all of them."""
    arguments = step.named_arguments()
    axes = arguments.get("dim")
    if axes is None or axes == []:
        axes = list(range(source.dim()))
    return source.sum(axes, keepdim=bool(arguments.get("keepdim", False)))


def _softmax(step: Step, source: Tensor) -> Tensor:
    return source.sum(step.named_arguments()["dim"], keepdim=True).expand(source.shape)


def _batch_norm(step: Step, source: Tensor) -> Tensor:
    """With running statistics each cell by itself, else with all of its channel."""
    if not kinds.takes_batch_statistics(step):
        return source
    axes = [axis for axis in range(source.dim()) if axis != 1]
    return source.sum(axes, keepdim=True).expand(source.shape)


def _layer_norm(step: Step, source: Tensor) -> Tensor:
    axes = list(range(-len(step.named_arguments()["normalized_shape"]), 0))
    return source.sum(axes, keepdim=True).expand(source.shape)


def _group_norm(step: Step, source: Tensor) -> Tensor:
    groups = source.reshape(source.shape[0], step.named_arguments()["group"], -1)
    return groups.sum(2, keepdim=True).expand(groups.shape).reshape(source.shape)


def _gated(step: Step, source: Tensor) -> Tensor:
    """One half times a function of the other."""
    return sum(source.chunk(2, step.named_arguments()["dim"]))


def _indexed(step: Step, *sources: Tensor) -> Tensor:
    """Cells picked by numbers, which do not come from the input themselves."""
    if isinstance(step.arguments[0], Ref) and len(step.inputs) == 1:
        return _movement(step, *sources)
    raise NotImplementedError(f"{step.name}: which cells {step.op} reads is for its input to say")


def _attention(step: Step, *sources: Tensor) -> Tensor:
    """A query, all keys, and one channel of all values; up to its own place if causal."""
    arguments = step.named_arguments()
    if arguments["is_causal"] or arguments.get("attn_mask") is not None:
        raise NotImplementedError(f"{step.name}: which cells a masked attention reads")
    query, key, value = (
        filled if isinstance(argument, Ref) else torch.zeros_like(filled)
        for argument, filled in zip(step.arguments[:3], _filled(step, sources), strict=False)
    )
    return (
        query.sum(-1, keepdim=True) + key.sum((-2, -1), keepdim=True) + value.sum(-2, keepdim=True)
    )


def _product(step: Step, *sources: Tensor) -> Tensor:
    """A matrix product: a row of the first, a column of the second factor; a bias by itself."""
    names = [a.name for a in step.op._schema.arguments]
    operands = dict(zip(names, _filled(step, sources), strict=False))
    read = dict(zip(names, step.arguments, strict=False))
    factors = [name for name in names if isinstance(operands.get(name), Tensor)]
    addend, first, second = (None, *factors) if len(factors) == 2 else factors
    result = torch.zeros(step.value.shape, dtype=torch.float64)
    ones = {name: torch.ones_like(operands[name]) for name in (first, second)}
    if isinstance(read[first], Ref):
        result = result + operands[first] @ ones[second]
    if isinstance(read[second], Ref):
        result = result + ones[first] @ operands[second]
    if addend is not None and isinstance(read[addend], Ref):
        result = result + operands[addend]
    return result


_RULES: dict[Spread, frozenset[str]] = {
    _convolution: frozenset(kinds.CONVOLUTIONS + kinds.CONV_BLOCKS),
    _pool: frozenset(kinds.MAX_POOLS + kinds.MEAN_POOLS),
    _adaptive_pool: frozenset(kinds.ADAPTIVE_POOLS),
    _batch_norm: frozenset(kinds.BATCH_NORMS),
    _layer_norm: frozenset(kinds.LAYER_NORMS),
    _group_norm: frozenset(kinds.GROUP_NORMS),
    _softmax: frozenset(kinds.SOFTMAXES),
    _reduction: frozenset(kinds.REDUCTIONS),
    _gated: frozenset(("glu",)),
    _indexed: frozenset(("index", "gather", "index_select")),
    _attention: frozenset(("_scaled_dot_product_flash_attention_for_cpu",)),
    _product: frozenset(kinds.PRODUCTS),
    _movement: frozenset(
        (
            *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t"),
            *("squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "as_strided"),
            *("cat", "stack", "split", "split_with_sizes", "unbind", "chunk", "repeat", "roll"),
            *("flip", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"),
            *("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"),
            *("_upsample_bilinear2d_aa", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
            *("alias", "detach", "unfold", "diagonal", "im2col", "col2im", "cumsum"),
            *("avg_pool3d", "reflection_pad1d", "replication_pad1d"),
        )
    ),
}

# Marked as pointwise by PyTorch are only some of those that are.
_POINTWISE = frozenset(
    (
        *("clone", "_to_copy", "contiguous", "relu", "relu_", "dropout", "native_dropout"),
        *("_prelu_kernel", "lift_fresh", "hardtanh", "hardtanh_", "silu_", "gelu_", "copy_"),
        *("mish_", "hardswish", "hardswish_", "threshold_", "log_sigmoid_forward"),
    )
)


def _filled(step: Step, sources: Sequence[Tensor]) -> tuple:
    """The arguments with the sources in their places, and zeros for constants but indices."""
    by_step = dict(zip(dict.fromkeys(step.inputs), sources, strict=True))

    def fill(leaf: object) -> object:
        if isinstance(leaf, Ref):
            return by_step[leaf.step]
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                return leaf.cpu()
            return torch.zeros_like(leaf, dtype=torch.float64, device="cpu")
        return leaf

    def walk(tree: object) -> Any:
        return type(tree)(map(walk, tree)) if isinstance(tree, (tuple, list)) else fill(tree)

    return walk(step.arguments)


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])
