// What the convolutions' glue shares with ops that contain one.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// Fills in all but the problem, the pass and the operands.
void describe_conv2d(Conv2dCall& call, const at::Tensor& like, at::MemoryFormat format);

// The algorithm asked for, noted for last_algorithm(), or an exception: a name is never exchanged
// for another silently. "auto+winograd" is "auto" with Winograd's algorithms allowed: a value, like
// any name, so that it reaches the backward pass and a compiled graph as the names do. `call` is
// described, and has its operands, with which convext.autotune() measures.
const Conv2dAlgorithm& pick_conv2d_algorithm(const char* op, const Conv2dCall& call,
                                             std::string_view name);

}  // namespace convext::cpu
