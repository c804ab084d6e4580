// Batch norm and the gradient of a convolution's bias on the CPU: check, allocate, describe, call,
// return.
#include "cpu/batch_norm.h"

#include <ATen/Functions.h>

#include "common/parallel.h"
#include "cpu/glue.h"
#include "tensor_args.h"

namespace convext::cpu {
namespace {

using at::Tensor;
using std::optional;

}  // namespace

BatchNormCall describe_batch_norm(const BatchNormProblem& problem, const Tensor& like,
                                  at::MemoryFormat format) {
  BatchNormCall call{};
  call.problem = problem;
  call.dtype = dtype_of(like);
  call.layout = layout_of(format);
  call.isa = &kernels();
  call.threads = num_threads();
  return call;
}

BatchNormGradients batch_norm_gradients(const char* op, const BatchNormProblem& problem,
                                        const Tensor& grad_output, const Tensor& input,
                                        const Tensor& mean, const Tensor& var,
                                        const optional<Tensor>& weight,
                                        const optional<Tensor>& bias, double eps, bool training,
                                        Relu relu) {
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::ScalarType type = sum_type(input);
  const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
  const Tensor m = channel_values(mean, type), v = channel_values(var, type);
  const Tensor w = channel_values(weight, type), b = channel_values(bias, type);
  const BatchNormGradients grad{
      empty_output(input.sizes(), input, format), empty_channels(input, problem.channels),
      empty_channels(input, problem.channels),
      relu == Relu::none ? Tensor() : empty_channels(input, problem.channels)};
  BatchNormCall call = describe_batch_norm(problem, input, format);
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
  run_kernel(op, call, cpu::batch_norm_backward);
  return grad;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input,
                                                    const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, double eps) {
  const BatchNormProblem problem = check_batch_norm_train(input, weight, bias, eps);
  const at::MemoryFormat format = input.suggest_memory_format();
  const Tensor x = input.contiguous(format);
  const Tensor w = channel_values(weight, sum_type(input));
  const Tensor b = channel_values(bias, sum_type(input));
  const Tensor output = empty_output(input.sizes(), input, format);
  const Tensor mean = empty_channels(input, problem.channels);
  const Tensor var = empty_channels(input, problem.channels);
  BatchNormCall call = describe_batch_norm(problem, input, format);
  call.input = x.const_data_ptr();
  call.weight = data_or_null(w);
  call.bias = data_or_null(b);
  call.mean = mean.mutable_data_ptr();
  call.var = var.mutable_data_ptr();
  call.eps = eps;
  call.output = output.mutable_data_ptr();
  run_kernel("batch_norm_train", call, cpu::batch_norm_train);
  return {output, mean, var};
}

Tensor batch_norm_eval(const Tensor& input, const Tensor& mean, const Tensor& var,
                       const optional<Tensor>& weight, const optional<Tensor>& bias, double eps) {
  const BatchNormProblem problem = check_batch_norm_eval(input, mean, var, weight, bias, eps);
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::ScalarType type = sum_type(input);
  const Tensor x = input.contiguous(format);
  const Tensor m = channel_values(mean, type), v = channel_values(var, type);
  const Tensor w = channel_values(weight, type), b = channel_values(bias, type);
  const Tensor output = empty_output(input.sizes(), input, format);
  BatchNormCall call = describe_batch_norm(problem, input, format);
  call.input = x.const_data_ptr();
  call.weight = data_or_null(w);
  call.bias = data_or_null(b);
  call.mean = const_cast<void*>(m.const_data_ptr());
  call.var = const_cast<void*>(v.const_data_ptr());
  call.eps = eps;
  call.output = output.mutable_data_ptr();
  run_kernel("batch_norm_eval", call, cpu::batch_norm_eval);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output,
                                                       const Tensor& input, const Tensor& mean,
                                                       const Tensor& var,
                                                       const optional<Tensor>& weight, double eps,
                                                       bool training) {
  const BatchNormProblem problem =
      check_batch_norm_backward(grad_output, input, mean, var, weight, eps, training);
  const BatchNormGradients grad =
      batch_norm_gradients("batch_norm_backward", problem, grad_output, input, mean, var, weight,
                           std::nullopt, eps, training, Relu::none);
  const at::ScalarType type = weight ? weight->scalar_type() : sum_type(input);
  return {grad.input, of_type(grad.weight, type), of_type(grad.bias, type)};
}

Tensor conv2d_backward_bias(const Tensor& grad_output) {
  check_conv2d_backward_bias(grad_output);
  const at::MemoryFormat format = grad_output.suggest_memory_format();
  const Tensor g = grad_output.contiguous(format);
  const Tensor grad_bias = empty_channels(grad_output, grad_output.size(1));
  BatchNormCall call = describe_batch_norm(
      {grad_output.size(0), grad_output.size(1), grad_output.size(2) * grad_output.size(3)},
      grad_output, format);
  call.grad_output = g.const_data_ptr();
  call.grad_bias = grad_bias.mutable_data_ptr();
  run_kernel("conv2d_backward_bias", call, channel_sum);
  return of_type(grad_bias, grad_output.scalar_type());
}

void register_ops(torch::Library& m) {
  m.impl("batch_norm_train", &batch_norm_train);
  m.impl("batch_norm_eval", &batch_norm_eval);
  m.impl("batch_norm_backward", &batch_norm_backward);
  m.impl("conv2d_backward_bias", &conv2d_backward_bias);
}

}  // namespace

CONVEXT_REGISTER_CPU(register_ops)

}  // namespace convext::cpu
