#include "device_ops/conv2d.h"

#include "cpu/glue.h"

CONVEXT_REGISTER_CPU(convext::Conv2dOps<convext::cpu::Device>::register_ops)
