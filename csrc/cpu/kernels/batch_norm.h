// Entry points of batch norm, alone or with a ReLU beside it, and of the sum that is the gradient
// of a convolution's bias, on the CPU.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/batch_norm_problem.h"
#include "common/types.h"
#include "cpu/kernels/call_key.h"
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
  // A ReLU in the same pass. before_norm: input is that ReLU's result, and grad_input the gradient
  // of what came before it (backward only; eval takes input as it is). after_norm: output is
  // max(norm, 0), in eval and backward, to which bias then belongs as well. Not for training.
  Relu relu;
  void* grad_input_sum;  // (C): backward's sums of grad_input in each channel, or null
  const IsaKernels* isa;
  int64_t threads;  // shares the work out; never changes a bit of the result

  BatchNormCall description() const {
    BatchNormCall call = *this;
    call.input = presence(input);
    call.grad_output = presence(grad_output);
    call.weight = presence(weight);
    call.bias = presence(bias);
    call.mean = presence(mean);
    call.var = presence(var);
    call.output = presence(output);
    call.grad_weight = presence(grad_weight);
    call.grad_bias = presence(grad_bias);
    call.grad_input_sum = presence(grad_input_sum);
    return call;
  }
  bool operator==(const BatchNormCall&) const = default;
  uint64_t hash() const {
    return hash_of(problem.batch, problem.channels, problem.pixels, dtype, layout, training, relu);
  }
};

// On a counting arena each only lays out its workspace; otherwise it also computes. An output may
// not overlap an input.
void batch_norm_train(const BatchNormCall&, Arena&);
void batch_norm_eval(const BatchNormCall&, Arena&);
void batch_norm_backward(const BatchNormCall&, Arena&);

// grad_bias = sum of grad_output over everything but the channels.
void channel_sum(const BatchNormCall&, Arena&);

}  // namespace convext::cpu
