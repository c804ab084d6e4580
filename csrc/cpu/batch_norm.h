// What batch norm's glue shares with ops that contain one.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels/batch_norm.h"

namespace convext::cpu {

// All but the operands, eps and what is to be done.
BatchNormCall describe_batch_norm(const BatchNormProblem& problem, const at::Tensor& like,
                                  at::MemoryFormat format);

// The last three are (C), of the dtype in which kernels add up; input_sum, the sum of the gradient
// of input, is defined where there is a ReLU.
struct BatchNormGradients {
  at::Tensor input, weight, bias, input_sum;
};

// Of checked arguments; see BatchNormCall for what a ReLU makes of them.
BatchNormGradients batch_norm_gradients(const char* op, const BatchNormProblem& problem,
                                        const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& mean, const at::Tensor& var,
                                        const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias, double eps,
                                        bool training, Relu relu);

}  // namespace convext::cpu
