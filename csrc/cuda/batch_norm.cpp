#include "device_ops/batch_norm.h"

#include "cuda/glue.h"

CONVEXT_REGISTER_CUDA(convext::BatchNormOps<convext::cuda::Device>::register_ops)
