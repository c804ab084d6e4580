#include "device_ops/conv2d.h"

#include "cuda/glue.h"

CONVEXT_REGISTER_CUDA(convext::Conv2dOps<convext::cuda::Device>::register_ops)
