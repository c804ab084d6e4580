// Entry points of batch norm, alone or with a ReLU beside it, and of the sum that is the gradient
// of a convolution's bias, on CUDA.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/batch_norm_problem.h"
#include "common/types.h"
#include "cuda/kernels/stream.h"

namespace convext::cuda {

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
  // of what came before it (backward only; forward takes input as it is). after_norm: output is
  // max(norm, 0), also in backward, to which bias then belongs as well.
  Relu relu;
  void* grad_input_sum;  // (C): backward's sums of grad_input in each channel, or null
  Stream stream;
};

// On a counting arena each only lays out its workspace, by the call without its pointers; otherwise
// it also launches kernels, on the call's stream, and does nothing else. Work is cut by the
// problem, dtype and layout alone, and sums are taken in an order fixed by the cut: the same bits
// on every run, wherever the tensors lie. An output may not overlap an input.
void batch_norm_train(const BatchNormCall&, Arena&);
void batch_norm_eval(const BatchNormCall&, Arena&);
void batch_norm_backward(const BatchNormCall&, Arena&);

// batch_norm_train where someone else has gathered the moments of the input: the call's mean is
// given, and so is the sum of squared deviations from it, (C); var is a result.
void batch_norm_by_moments(const BatchNormCall&, const void* deviation, Arena&);

// grad_bias = sum of grad_output over everything but the channels.
void channel_sum(const BatchNormCall&, Arena&);

}  // namespace convext::cuda
