// Batch norm and the gradient of a convolution's bias on the CPU: check, allocate, describe, call,
// return.
#include "cpu/kernels/batch_norm.h"

#include <ATen/Functions.h>

#include "common/parallel.h"
#include "cpu/glue.h"
#include "tensor_args.h"

namespace convext::cpu {
namespace {

using at::Tensor;
using std::optional;

BatchNormCall describe(const BatchNormProblem& problem, const Tensor& like,
                       at::MemoryFormat format) {
  BatchNormCall call{};
  call.problem = problem;
  call.dtype = dtype_of(like);
  call.layout = layout_of(format);
  call.isa = &kernels();
  call.threads = num_threads();
  return call;
}

void run(const char* op, const BatchNormCall& call, void (*kernel)(const BatchNormCall&, Arena&)) {
  run_with_workspace(op, [&](Arena& arena) { kernel(call, arena); });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input,
                                                    const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, double eps) {
  const BatchNormProblem problem = check_batch_norm_train(input, weight, bias, eps);
  const at::MemoryFormat format = input.suggest_memory_format();
  const Tensor x = input.contiguous(format);
  const Tensor w = channel_values(weight, sum_type(input));
  const Tensor b = channel_values(bias, sum_type(input));
  const Tensor output = at::empty(input.sizes(), input.options().memory_format(format));
  const Tensor mean = empty_channels(input, problem.channels);
  const Tensor var = empty_channels(input, problem.channels);
  BatchNormCall call = describe(problem, input, format);
  call.input = x.const_data_ptr();
  call.weight = data_or_null(w);
  call.bias = data_or_null(b);
  call.mean = mean.mutable_data_ptr();
  call.var = var.mutable_data_ptr();
  call.eps = eps;
  call.output = output.mutable_data_ptr();
  run("batch_norm_train", call, cpu::batch_norm_train);
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
  const Tensor output = at::empty(input.sizes(), input.options().memory_format(format));
  BatchNormCall call = describe(problem, input, format);
  call.input = x.const_data_ptr();
  call.weight = data_or_null(w);
  call.bias = data_or_null(b);
  call.mean = const_cast<void*>(m.const_data_ptr());
  call.var = const_cast<void*>(v.const_data_ptr());
  call.eps = eps;
  call.output = output.mutable_data_ptr();
  run("batch_norm_eval", call, cpu::batch_norm_eval);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output,
                                                       const Tensor& input, const Tensor& mean,
                                                       const Tensor& var,
                                                       const optional<Tensor>& weight, double eps,
                                                       bool training) {
  const BatchNormProblem problem =
      check_batch_norm_backward(grad_output, input, mean, var, weight, eps, training);
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::ScalarType type = sum_type(input);
  const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
  const Tensor m = channel_values(mean, type), v = channel_values(var, type);
  const Tensor w = channel_values(weight, type);
  const Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(format));
  const Tensor grad_weight = empty_channels(input, problem.channels);
  const Tensor grad_bias = empty_channels(input, problem.channels);
  BatchNormCall call = describe(problem, input, format);
  call.grad_output = g.const_data_ptr();
  call.input = x.const_data_ptr();
  call.weight = data_or_null(w);
  call.mean = const_cast<void*>(m.const_data_ptr());
  call.var = const_cast<void*>(v.const_data_ptr());
  call.eps = eps;
  call.training = training;
  call.output = grad_input.mutable_data_ptr();
  call.grad_weight = grad_weight.mutable_data_ptr();
  call.grad_bias = grad_bias.mutable_data_ptr();
  run("batch_norm_backward", call, cpu::batch_norm_backward);
  const at::ScalarType parameter_type = weight ? weight->scalar_type() : type;
  return {grad_input, grad_weight.to(parameter_type), grad_bias.to(parameter_type)};
}

Tensor conv2d_backward_bias(const Tensor& grad_output) {
  check_conv2d_backward_bias(grad_output);
  const at::MemoryFormat format = grad_output.suggest_memory_format();
  const Tensor g = grad_output.contiguous(format);
  const Tensor grad_bias = empty_channels(grad_output, grad_output.size(1));
  BatchNormCall call = describe(
      {grad_output.size(0), grad_output.size(1), grad_output.size(2) * grad_output.size(3)},
      grad_output, format);
  call.grad_output = g.const_data_ptr();
  call.grad_bias = grad_bias.mutable_data_ptr();
  run("conv2d_backward_bias", call, channel_sum);
  return grad_bias.to(grad_output.scalar_type());
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
