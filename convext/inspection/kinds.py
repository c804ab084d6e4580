"""Families of operations by `Step.kind`, for a layer reaches PyTorch's dispatcher by several names.

By which depends on the device, on the mode and on whose layer it is; ours are conv2d,
conv_block_eval and batch_norm_eval. Each reader of a tape says what it makes of a family.
"""

from convext.inspection.step import Step

CONVOLUTIONS = ("convolution", "_convolution", "conv2d")
CONV_BLOCKS = ("conv_block_eval",)  # a convolution with what follows it, ReLU and batch norm
MAX_POOLS = ("max_pool2d_with_indices", "max_pool2d")
MEAN_POOLS = ("avg_pool2d",)
ADAPTIVE_POOLS = ("_adaptive_avg_pool2d", "adaptive_max_pool2d")
BATCH_NORMS = (
    *("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"),
    *("_native_batch_norm_legit_no_training", "batch_norm_eval", "batch_norm_train"),
)
LAYER_NORMS = ("native_layer_norm",)
GROUP_NORMS = ("native_group_norm",)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv")
SOFTMAXES = ("_softmax", "_log_softmax", "_safe_softmax")
REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "logsumexp"),
    *("std", "var", "linalg_vector_norm"),
)


def takes_batch_statistics(step: Step) -> bool:
    """Whether a batch norm takes mean and variance of the batch itself, not the running ones."""
    return step.named_arguments().get("training", step.kind == "batch_norm_train")
