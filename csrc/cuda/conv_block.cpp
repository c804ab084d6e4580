#include "device_ops/conv_block.h"

#include "cuda/glue.h"

CONVEXT_REGISTER_CUDA(convext::ConvBlockOps<convext::cuda::Device>::register_ops)
