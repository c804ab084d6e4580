// The fused block on the CPU: check, allocate, describe, call, return.
#include "cpu/kernels/conv_block.h"

#include <ATen/Functions.h>

#include "cpu/batch_norm.h"
#include "cpu/conv2d.h"
#include "cpu/glue.h"
#include "tensor_args.h"

namespace convext::cpu {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

// Tensors that a block's kernels read, as they want them. They must live as long as the call.
struct Operands {
  Operands(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
           const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias)
      : format(common_memory_format({input, weight})),
        input(input.contiguous(format)),
        weight(weight.contiguous(format)),
        bias(bias ? bias->contiguous() : Tensor()),
        norm_weight(channel_values(norm_weight, sum_type(input))),
        norm_bias(channel_values(norm_bias, sum_type(input))) {}

  Tensor empty_output(const Conv2dProblem& p) const {
    return cpu::empty_output({p.batch, p.out_channels, p.out_height(), p.out_width()}, input,
                             format);
  }

  ConvBlockCall describe(const char* op, const ConvBlockProblem& problem, double eps,
                         std::string_view algorithm) const {
    ConvBlockCall call{};
    call.conv.problem = problem.conv;
    call.conv.pass = Conv2dPass::forward;
    call.conv.input = input.const_data_ptr();
    call.conv.weight = weight.const_data_ptr();
    call.conv.bias = data_or_null(bias);
    describe_conv2d(call.conv, input, format);
    call.algorithm = &pick_conv2d_algorithm(op, call.conv, algorithm);
    call.norm = describe_batch_norm(problem.norm(), input, format);
    call.norm.weight = data_or_null(norm_weight);
    call.norm.bias = data_or_null(norm_bias);
    call.norm.eps = eps;
    call.norm.relu = problem.relu;
    return call;
  }

  at::MemoryFormat format;
  Tensor input, weight, bias, norm_weight, norm_bias;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_train(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
    std::string_view algorithm) {
  const ConvBlockProblem problem = check_conv_block_train(
      input, weight, bias, norm_weight, norm_bias, {stride, padding, dilation, groups}, eps, order);
  const Operands operands(input, weight, bias, norm_weight, norm_bias);
  ConvBlockCall call = operands.describe("conv_block_train", problem, eps, algorithm);
  const Tensor activation = operands.empty_output(problem.conv);
  const Tensor output = operands.empty_output(problem.conv);
  const Tensor mean = empty_channels(input, problem.conv.out_channels);
  const Tensor var = empty_channels(input, problem.conv.out_channels);
  if (output.numel() == 0) return {output, activation, mean.zero_(), var.zero_()};
  call.conv.output = activation.mutable_data_ptr();
  call.norm.input = call.conv.output;
  call.norm.mean = mean.mutable_data_ptr();
  call.norm.var = var.mutable_data_ptr();
  call.norm.output = output.mutable_data_ptr();
  run_kernel("conv_block_train", call, cpu::conv_block_train);
  return {output, activation, mean, var};
}

std::tuple<Tensor, Tensor> conv_block_eval(const Tensor& input, const Tensor& weight,
                                           const optional<Tensor>& bias, const Tensor& mean,
                                           const Tensor& var, const optional<Tensor>& norm_weight,
                                           const optional<Tensor>& norm_bias, IntArrayRef stride,
                                           IntArrayRef padding, IntArrayRef dilation,
                                           int64_t groups, double eps, std::string_view order,
                                           bool keep_activation, std::string_view algorithm) {
  const ConvBlockProblem problem =
      check_conv_block_eval(input, weight, bias, mean, var, norm_weight, norm_bias,
                            {stride, padding, dilation, groups}, eps, order);
  const Operands operands(input, weight, bias, norm_weight, norm_bias);
  const Tensor m = channel_values(mean, sum_type(input)), v = channel_values(var, sum_type(input));
  ConvBlockCall call = operands.describe("conv_block_eval", problem, eps, algorithm);
  const Tensor output = operands.empty_output(problem.conv);
  const Tensor activation =
      keep_activation ? operands.empty_output(problem.conv) : at::empty({0}, input.options());
  if (output.numel() == 0) return {output, activation};
  call.conv.output = keep_activation ? activation.mutable_data_ptr() : nullptr;
  call.norm.input = call.conv.output;
  call.norm.mean = const_cast<void*>(m.const_data_ptr());
  call.norm.var = const_cast<void*>(v.const_data_ptr());
  call.norm.output = output.mutable_data_ptr();
  run_kernel("conv_block_eval", call, cpu::conv_block_eval);
  return {output, activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& grad_output, const Tensor& activation, const Tensor& mean, const Tensor& var,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, double eps,
    bool training, std::string_view order) {
  Relu relu = Relu::none;
  const BatchNormProblem problem = check_conv_block_backward(
      grad_output, activation, mean, var, norm_weight, norm_bias, eps, training, order, &relu);
  const BatchNormGradients grad =
      batch_norm_gradients("conv_block_backward", problem, grad_output, activation, mean, var,
                           norm_weight, norm_bias, eps, training, relu);
  return {grad.input, grad.input_sum, grad.weight, grad.bias};
}

void register_ops(torch::Library& m) {
  m.impl("conv_block_train", &conv_block_train);
  m.impl("conv_block_eval", &conv_block_eval);
  m.impl("conv_block_backward", &conv_block_backward);
}

}  // namespace

CONVEXT_REGISTER_CPU(register_ops)

}  // namespace convext::cpu
