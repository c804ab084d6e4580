#include "device_ops/batch_norm.h"

#include "cpu/glue.h"

CONVEXT_REGISTER_CPU(convext::BatchNormOps<convext::cpu::Device>::register_ops)
