"""Convolution, ReLU and batch norm as one layer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from convext import functional
from convext.nn import BatchNorm2d, Conv2d, fx_node, is_fx_leaf, weight_and_bias

ORDERS = ("conv-relu-norm", "conv-norm-relu")


class ConvBlock2d(nn.Module):
    """`Conv2d`, ReLU and `BatchNorm2d`, fused: `convext.functional.conv_block` as a layer.

    Its parts are the submodules `conv` and `norm`, so that parameters, buffers and state_dict are
    those of the separate layers under these names; `convext.fuse` and `convext.unfuse` exchange
    one for the other. Where a part has a hook, or has been replaced by another kind of layer (by
    `torch.nn.SyncBatchNorm`, say), the parts are called one after another.

    Args:
        in_channels to padding_mode: see `torch.nn.Conv2d`.
        order: "conv-relu-norm" or "conv-norm-relu".
        eps, momentum, affine, track_running_stats: see `torch.nn.BatchNorm2d`.
        algorithm: for the convolution, see `convext.Conv2d`.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to (N, out_channels, out_H, out_W) or
        (out_channels, out_H, out_W); float32, float64, bfloat16 or float16.

    Raises:
        ValueError: an unknown order, or arguments that the two layers refuse.
    """

    # What `convext.fuse` made the block of: the names that the layers had, and whether
    # convolution and batch norm were stock ones.
    fused_from: tuple[str | None, ...] | None = None
    was_stock: tuple[bool, bool] = (False, False)

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
        *,
        order: str = "conv-relu-norm",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        _check_order(order)
        self.order = order
        self.conv = Conv2d(
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
            algorithm=algorithm,
        )
        self.norm = BatchNorm2d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    @classmethod
    def from_layers(cls, conv: Conv2d, norm: BatchNorm2d, order: str) -> ConvBlock2d:
        """A block of two layers that exist, which become its parts.

        Raises:
            TypeError: layers of other classes.
            ValueError: an unknown order, or a norm of another number of channels.
        """
        if not _is_ours(conv, norm):
            raise TypeError(
                "from_layers() needs a convext.Conv2d and a convext.BatchNorm2d, got "
                f"{type(conv).__name__} and {type(norm).__name__}"
            )
        if norm.num_features != conv.out_channels:
            raise ValueError(
                f"norm has {norm.num_features} features, conv {conv.out_channels} out_channels"
            )
        _check_order(order)
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.order, block.conv, block.norm = order, conv, norm
        block.training = conv.training
        return block

    def is_fused(self) -> bool:
        """Whether a call is one operation, and not the parts one after another (see above)."""
        return _are_fusible(self.conv, self.norm)

    def layers(self) -> nn.Sequential:
        """The parts as separate layers, `conv`, `relu` and `norm`; they are not copied."""
        parts = {"conv": self.conv, "relu": nn.ReLU(), "norm": self.norm}
        layers = nn.Sequential(OrderedDict((name, parts[name]) for name in self.order.split("-")))
        layers.training = parts["relu"].training = self.training
        return layers

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and is_fx_leaf(self, input):
            return fx_node(self, input)
        parts = self._modules
        conv, norm = parts["conv"], parts["norm"]
        if not _are_fusible(conv, norm):
            return functional.conv_block_in_parts(conv(input), self.order, norm)
        running_mean, running_var, training, momentum = norm._statistics()
        input, padding = conv._pad(input)
        return functional.conv_block(
            input,
            *weight_and_bias(conv),
            running_mean,
            running_var,
            *weight_and_bias(norm),
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            training=training,
            momentum=momentum,
            eps=norm.eps,
            order=self.order,
            algorithm=conv.algorithm,
        )

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


def _are_fusible(conv: nn.Module, norm: nn.Module) -> bool:
    return _is_ours(conv, norm) and not (has_hooks(conv) or has_hooks(norm))


def _is_ours(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the layers compute what `functional.conv_block` does (parametrised ones do)."""
    conv_type, norm_type = type(conv), type(norm)
    if conv_type is Conv2d and norm_type is BatchNorm2d:
        return True
    return (
        isinstance(conv, Conv2d)
        and conv_type.forward is Conv2d.forward
        and conv_type._conv_forward is Conv2d._conv_forward
        and isinstance(norm, BatchNorm2d)
        and norm_type.forward is BatchNorm2d.forward
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
