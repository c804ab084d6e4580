"""Batch norm over the joined batch of several processes that train together.

Each process sees a part of the batch. In the forward pass the parts' counts, means and variances
are gathered and merged as Chan, Golub and LeVeque (1979) merge the moments of two samples; in the
backward pass so are the two sums over the batch that the gradient of input needs. Everyone merges
the same numbers in the order of the ranks, so that all processes hold the same bits.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from convext.nn import BatchNorm2d

Model = TypeVar("Model", bound=nn.Module)

_ops = torch.ops.convext


class SyncBatchNorm2d(BatchNorm2d):
    """`convext.BatchNorm2d` with the statistics of all processes' batches together.

    What `torch.nn.SyncBatchNorm` is for GPUs, on every device that our kernels know: N processes
    compute what one would with the same batches joined, output, running statistics and gradient
    of input alike. As in PyTorch, the gradients of weight and bias are those of a process's own
    batch, which `DistributedDataParallel` averages. Batches may differ in size and even be empty.

    In evaluation, and in training outside a process group or in one of a single process, it is
    `BatchNorm2d`. Its state_dict is that of `BatchNorm2d`.

    Args:
        process_group: whose processes share their statistics; None means all. A process outside
            the group normalises by its own.
        options: bias, where `torch.nn.BatchNorm2d` has it.
        All others: see `torch.nn.BatchNorm2d`.

    Shape:
        (N, C, H, W) to the same; float32, float64, bfloat16 or float16.

    Raises:
        ValueError: input that is not 4D or has no channels, or a single value per channel in all
            batches together. The latter goes unnoticed on CUDA, where looking would make the host
            wait for the device, and under torch.compile, where it would break the graph: the
            variance is 0 then.
        RuntimeError: a second derivative, or a transform of `torch.func`: there are none.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: bool,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        if input.size(1) == 0:
            raise ValueError(f"expected input with channels, got size {list(input.shape)}")
        momentum = self._count_batch()
        output, mean, var, count = _SyncBatchNorm.apply(
            input, self.weight, self.bias, self.eps, group
        )
        if self.track_running_stats and self.running_mean is not None:
            momentum = momentum * count.clamp(max=1)  # of nothing there is nothing to learn
            unbiased = count / (count - 1).clamp(min=1)
            with torch.no_grad():
                self.running_mean.mul_(1 - momentum).add_(momentum * mean)
                self.running_var.mul_(1 - momentum).add_(momentum * unbiased * var)
        return output

    def _group(self) -> dist.ProcessGroup | None:
        """The processes to share with; None where there is nobody or nothing to share."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        # The size is -1 for whoever is not in the group.
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Model, process_group: dist.ProcessGroup | None = None
    ) -> Model:
        """Make every `BatchNorm2d` of a model, stock or ours, synchronised, in place.

        A layer changes its class and nothing else, as in `convext.replace_layers`;
        `convext.restore_layers` makes it a `torch.nn.SyncBatchNorm`. Only layers of exactly these
        types are changed. A warning names other kinds of batch norm, which stay as they are.

        Args:
            module: any module, also a single layer.
            process_group: see `SyncBatchNorm2d`.

        Returns:
            The module.
        """
        left = set()
        for name, layer in module.named_modules():
            if type(layer) in (nn.BatchNorm2d, BatchNorm2d):
                layer.__class__ = cls
                layer.process_group = process_group
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(
                layer, (nn.SyncBatchNorm, SyncBatchNorm2d)
            ):
                left.add(f"{name} ({type(layer).__name__})")
        if left:
            warnings.warn(f"not synchronised: {', '.join(sorted(left))}", stacklevel=2)
        return module


class _SyncBatchNorm(torch.autograd.Function):
    """From (input, weight, bias, eps, group) to (output, mean, var, count).

    mean, biased var and the number of values per channel are those of the joined batch.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, eps, group):
        mean, var, count = _joint_statistics(input, eps, group)
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var, count)
        return _ops.batch_norm_eval(input, mean, var, weight, bias, eps), mean, var, count

    # With r = 1 / sqrt(var + eps), y = (x - mean) * r and means over the joined batch, the
    # gradient of x is w r (g - mean(g) - y mean(g y)). The op with training=False returns w r g
    # and the local sums of g y and of g; what is to be subtracted is an affine map of y, which
    # is what normalising computes.
    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        input, weight, mean, var, count = ctx.saved_tensors
        scale = None if weight is None else weight.to(mean.dtype)
        grad_input, grad_weight, grad_bias = _ops.batch_norm_backward(
            grad_output, input, mean, var, scale, ctx.eps, False
        )
        if ctx.needs_input_grad[0]:
            sums = _gather(torch.cat([grad_weight, grad_bias]).double(), ctx.group).sum(0)
            slope, shift = (sums / count.clamp(min=1)).to(mean.dtype).chunk(2)
            factor = (var + ctx.eps).rsqrt()
            if scale is not None:
                factor = factor * scale
            grad_input -= _ops.batch_norm_eval(
                input, mean, var, factor * slope, factor * shift, ctx.eps
            )
        return (
            grad_input if ctx.needs_input_grad[0] else None,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _joint_statistics(
    input: Tensor, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, in the dtype that the kernels sum in, and count as float64."""
    mean, var, count = _local_statistics(input, eps)
    # In float64, which holds any count exactly.
    local = torch.cat(
        [mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)]
    )
    means, variances, counts = _gather(local, group).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    looks = total.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and total == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input sizes that hold one "
            f"in all processes together, and here {list(input.shape)}"
        )
    weights = counts / total.clamp(min=1)
    joint_mean = (weights * means).sum(0)
    joint_var = (weights * (variances + (means - joint_mean).square())).sum(0)
    return joint_mean.to(mean.dtype), joint_var.to(mean.dtype), total


def _local_statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    count = input.numel() // input.size(1)
    if count > 1:
        _, mean, var = _ops.batch_norm_train(input, None, None, eps)
        return mean, var, count
    # The op would refuse a single value, and of none it has no mean.
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = input.sum(dim=[0, *range(2, input.dim())], dtype=dtype)
    return mean, torch.zeros_like(mean), count


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Everyone's values (n,) as rows in the order of the ranks."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, values, group=group)
    return torch.stack(rows)
