// Batch norm and the gradient of a convolution's bias on any device: check, allocate, describe,
// call, return. See conv2d.h for what a Device is.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "device_ops/operands.h"
#include "tensor_args.h"

namespace convext {

// The last three are (C), of the dtype in which kernels add up; input_sum, the sum of the gradient
// of input, is defined where there is a ReLU.
struct BatchNormGradients {
  at::Tensor input, weight, bias, input_sum;
};

template <class Device>
struct BatchNormOps {
  using Tensor = at::Tensor;
  using MaybeTensor = std::optional<at::Tensor>;
  using Call = typename Device::BatchNormCall;

  // All but the operands, eps and what is to be done.
  static Call describe(const BatchNormProblem& problem, const Tensor& like,
                       at::MemoryFormat format) {
    Call call{};
    call.problem = problem;
    call.dtype = dtype_of(like);
    call.layout = layout_of(format);
    Device::describe(call);
    return call;
  }

  static Tensor empty_channels(const Tensor& like, int64_t channels) {
    return Device::empty({channels}, sum_type(like), at::MemoryFormat::Contiguous);
  }

  // Of checked arguments, on the current device; see BatchNormCall for what a ReLU makes of them.
  static BatchNormGradients gradients(const char* op, const BatchNormProblem& problem,
                                      const Tensor& grad_output, const Tensor& input,
                                      const Tensor& mean, const Tensor& var,
                                      const MaybeTensor& weight, const MaybeTensor& bias,
                                      double eps, bool training, Relu relu) {
    const at::MemoryFormat format = input.suggest_memory_format();
    const at::ScalarType type = sum_type(input);
    const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
    const Tensor m = channel_values(mean, type), v = channel_values(var, type);
    const Tensor w = channel_values(weight, type), b = channel_values(bias, type);
    const BatchNormGradients grad{
        Device::empty(input.sizes(), input.scalar_type(), format),
        empty_channels(input, problem.channels), empty_channels(input, problem.channels),
        relu == Relu::none ? Tensor() : empty_channels(input, problem.channels)};
    Call call = describe(problem, input, format);
    call.grad_output = g.const_data_ptr();
    call.input = x.const_data_ptr();
    call.weight = data_or_null(w);
    call.bias = data_or_null(b);
    call.mean = const_cast<void*>(m.const_data_ptr());
    call.var = const_cast<void*>(v.const_data_ptr());
    call.eps = eps;
    call.training = training;
    call.relu = relu;
    call.output = grad.input.mutable_data_ptr();
    call.grad_weight = grad.weight.mutable_data_ptr();
    call.grad_bias = grad.bias.mutable_data_ptr();
    call.grad_input_sum = grad.input_sum.defined() ? grad.input_sum.mutable_data_ptr() : nullptr;
    Device::run(op, call, Device::batch_norm_backward);
    return grad;
  }

  static std::tuple<Tensor, Tensor, Tensor> train(const Tensor& input, const MaybeTensor& weight,
                                                  const MaybeTensor& bias, double eps) {
    const BatchNormProblem problem = check_batch_norm_train(input, weight, bias, eps);
    const typename Device::Guard guard(input);
    const at::MemoryFormat format = input.suggest_memory_format();
    const Tensor x = input.contiguous(format);
    const Tensor w = channel_values(weight, sum_type(input));
    const Tensor b = channel_values(bias, sum_type(input));
    const Tensor output = Device::empty(input.sizes(), input.scalar_type(), format);
    const Tensor mean = empty_channels(input, problem.channels);
    const Tensor var = empty_channels(input, problem.channels);
    Call call = describe(problem, input, format);
    call.input = x.const_data_ptr();
    call.weight = data_or_null(w);
    call.bias = data_or_null(b);
    call.mean = mean.mutable_data_ptr();
    call.var = var.mutable_data_ptr();
    call.eps = eps;
    call.output = output.mutable_data_ptr();
    Device::run("batch_norm_train", call, Device::batch_norm_train);
    return {output, mean, var};
  }

  static Tensor eval(const Tensor& input, const Tensor& mean, const Tensor& var,
                     const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
    const BatchNormProblem problem = check_batch_norm_eval(input, mean, var, weight, bias, eps);
    const typename Device::Guard guard(input);
    const at::MemoryFormat format = input.suggest_memory_format();
    const at::ScalarType type = sum_type(input);
    const Tensor x = input.contiguous(format);
    const Tensor m = channel_values(mean, type), v = channel_values(var, type);
    const Tensor w = channel_values(weight, type), b = channel_values(bias, type);
    const Tensor output = Device::empty(input.sizes(), input.scalar_type(), format);
    Call call = describe(problem, input, format);
    call.input = x.const_data_ptr();
    call.weight = data_or_null(w);
    call.bias = data_or_null(b);
    call.mean = const_cast<void*>(m.const_data_ptr());
    call.var = const_cast<void*>(v.const_data_ptr());
    call.eps = eps;
    call.output = output.mutable_data_ptr();
    Device::run("batch_norm_eval", call, Device::batch_norm_eval);
    return output;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& mean, const Tensor& var,
                                                     const MaybeTensor& weight, double eps,
                                                     bool training) {
    const BatchNormProblem problem =
        check_batch_norm_backward(grad_output, input, mean, var, weight, eps, training);
    const typename Device::Guard guard(input);
    const BatchNormGradients grad =
        gradients("batch_norm_backward", problem, grad_output, input, mean, var, weight,
                  std::nullopt, eps, training, Relu::none);
    const at::ScalarType type = weight ? weight->scalar_type() : sum_type(input);
    return {grad.input, of_type(grad.weight, type), of_type(grad.bias, type)};
  }

  static Tensor conv2d_backward_bias(const Tensor& grad_output) {
    check_conv2d_backward_bias(grad_output);
    const typename Device::Guard guard(grad_output);
    const at::MemoryFormat format = grad_output.suggest_memory_format();
    const Tensor g = grad_output.contiguous(format);
    const Tensor grad_bias = empty_channels(grad_output, grad_output.size(1));
    Call call = describe(
        {grad_output.size(0), grad_output.size(1), grad_output.size(2) * grad_output.size(3)},
        grad_output, format);
    call.grad_output = g.const_data_ptr();
    call.grad_bias = grad_bias.mutable_data_ptr();
    Device::run("conv2d_backward_bias", call, Device::channel_sum);
    return of_type(grad_bias, grad_output.scalar_type());
  }

  static void register_ops(torch::Library& m) {
    m.impl("batch_norm_train", &train);
    m.impl("batch_norm_eval", &eval);
    m.impl("batch_norm_backward", &backward);
    m.impl("conv2d_backward_bias", &conv2d_backward_bias);
  }
};

}  // namespace convext
