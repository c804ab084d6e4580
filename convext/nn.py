"""The layers: subclasses of `torch.nn`'s, alike in everything but the kernels that compute them."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from convext import _C, functional
from convext.algorithms import check_algorithm_name


def is_fx_leaf(module: nn.Module, input: object) -> bool:
    """Whether torch.fx is tracing a model that holds this layer.

    Its tracer goes into every module from outside `torch.nn`; layers that stand for torch.nn's are
    to be single nodes of the graph, as those are.
    """
    return isinstance(input, Proxy) and input.tracer.root is not module


def fx_node(module: nn.Module, input: Proxy) -> Proxy:
    """The call of the layer in torch.fx's graph."""
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input,), {})


# `nn.Module.__getattr__` takes most of a microsecond, for each of a block's nine tensors. Where one
# is not in its place (parametrised, pruned, a replica's) it is an attribute of another kind.
def weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A layer's parameters, quickly."""
    held = module._parameters
    try:
        return held["weight"], held["bias"]
    except KeyError:
        return module.weight, module.bias


def buffer_of(module: nn.Module, name: str) -> Tensor | None:
    """A layer's buffer, quickly."""
    try:
        return module._buffers[name]
    except KeyError:
        return getattr(module, name)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on our kernels: same arguments, state_dict, initialisation and errors.

    Args:
        algorithm: "auto", or one of `convext.algorithms()`, for all passes.
        All others: see `torch.nn.Conv2d`.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to (N, out_channels, out_H, out_W) or
        (out_channels, out_H, out_W); float32, float64, bfloat16 or float16.

    Raises:
        ValueError: an argument that `torch.nn.Conv2d` refuses, or an unknown algorithm.
    """

    algorithm: str = "auto"  # for modules that replace_layers or an older pickle made

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        algorithm: str = "auto",
    ) -> None:
        check_algorithm_name(algorithm)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.algorithm = algorithm

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and is_fx_leaf(self, input):
            return fx_node(self, input)
        return self._conv_forward(input, *weight_and_bias(self))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._pad(input)
        return functional.conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            algorithm=self.algorithm,
        )

    def _pad(self, input: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        """The input, padded where zeros won't do, and the padding that is left for the op."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    def extra_repr(self) -> str:
        named = "" if self.algorithm == "auto" else f", algorithm={self.algorithm!r}"
        return super().extra_repr() + named


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on our kernels: same arguments, state_dict and errors.

    Shape:
        (N, C, H, W) to the same; float32, float64, bfloat16 or float16.

    Raises:
        ValueError: input that is not 4D, or a single value per channel in training.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and is_fx_leaf(self, input):
            return fx_node(self, input)
        self._check_input_dim(input)
        running_mean, running_var, training, momentum = self._statistics()
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            *weight_and_bias(self),
            training,
            momentum,
            self.eps,
        )

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, bool, float]:
        """Count a batch; return (running_mean, running_var, training, momentum) for it."""
        training = self.training
        running_mean, running_var = buffer_of(self, "running_mean"), buffer_of(self, "running_var")
        if training and not self.track_running_stats:
            running_mean = running_var = None
        training = training or (running_mean is None and running_var is None)
        return running_mean, running_var, training, self._count_batch()

    def _count_batch(self) -> float:
        """Count a training batch; return its weight in the running statistics."""
        counts = self.training and self.track_running_stats
        batches = buffer_of(self, "num_batches_tracked") if counts else None
        if batches is not None and (
            torch.compiler.is_compiling() or _C.count_batch(batches) is NotImplemented
        ):
            batches.add_(1)
        if self.momentum is not None:
            return self.momentum
        # momentum=None asks for the plain average over all batches so far.
        return 1.0 / float(batches) if batches is not None else 0.0


class LazyConv2d(nn.LazyConv2d, Conv2d):
    """`torch.nn.LazyConv2d` that becomes our `Conv2d` when it sees its first input."""

    cls_to_become = Conv2d

    def __init__(self, *args, algorithm: str = "auto", **kwargs) -> None:
        check_algorithm_name(algorithm)
        super().__init__(*args, **kwargs)
        self.algorithm = algorithm


class LazyBatchNorm2d(nn.LazyBatchNorm2d, BatchNorm2d):
    """`torch.nn.LazyBatchNorm2d` that becomes our `BatchNorm2d` when it sees its first input."""

    cls_to_become = BatchNorm2d
