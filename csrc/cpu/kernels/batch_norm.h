// Entry points of batch norm, and of the sum that is the gradient of a convolution's bias, on the
// CPU.
#pragma once

#include <cstdint>

#include "common/batch_norm_problem.h"
#include "common/types.h"
#include "cpu/kernels/arena.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// Tensors (N, C, *) have the call's dtype and layout (in nhwc C is innermost), arrays (C) the dtype
// of accumulation: double for float64, else float. What a function does not use is null.
struct BatchNormCall {
  BatchNormProblem problem;
  DType dtype;
  Layout layout;
  const void* input;
  const void* grad_output;
  const void* weight;  // (C), or null for ones
  const void* bias;    // (C), or null for zeros
  void* mean;          // (C): results of batch_norm_train, arguments of the others
  void* var;           // (C), biased
  double eps;
  bool training;      // backward: were mean and var computed from this input?
  void* output;       // output, or grad_input
  void* grad_weight;  // (C)
  void* grad_bias;    // (C)
  const IsaKernels* isa;
  int64_t threads;  // shares the work out; never changes a bit of the result
};

// On a counting arena each only lays out its workspace; otherwise it also computes. An output may
// not overlap an input.
void batch_norm_train(const BatchNormCall&, Arena&);
void batch_norm_eval(const BatchNormCall&, Arena&);
void batch_norm_backward(const BatchNormCall&, Arena&);

// grad_bias = sum of grad_output over everything but the channels.
void channel_sum(const BatchNormCall&, Arena&);

}  // namespace convext::cpu
