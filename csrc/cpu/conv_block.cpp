#include "device_ops/conv_block.h"

#include "cpu/glue.h"

CONVEXT_REGISTER_CPU(convext::ConvBlockOps<convext::cpu::Device>::register_ops)
