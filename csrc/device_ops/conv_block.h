// The fused block on any device: check, allocate, describe, call, return. See conv2d.h for what a
// Device is.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "device_ops/batch_norm.h"
#include "device_ops/conv2d.h"

namespace convext {

template <class Device>
struct ConvBlockOps {
  using Tensor = at::Tensor;
  using MaybeTensor = std::optional<at::Tensor>;
  using IntArrayRef = at::IntArrayRef;
  using Call = typename Device::ConvBlockCall;
  using Conv = Conv2dOps<Device>;
  using Norm = BatchNormOps<Device>;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> train(
      const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
      const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, IntArrayRef stride,
      IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
      std::string_view algorithm) {
    const ConvBlockProblem problem =
        check_conv_block_train(input, weight, bias, norm_weight, norm_bias,
                               {stride, padding, dilation, groups}, eps, order);
    const typename Device::Guard guard(input);
    const Operands operands(input, weight, bias, norm_weight, norm_bias);
    Call call = operands.describe("conv_block_train", problem, eps, algorithm);
    const Tensor activation = operands.empty_output(problem.conv);
    const Tensor output = operands.empty_output(problem.conv);
    const Tensor mean = Norm::empty_channels(input, problem.conv.out_channels);
    const Tensor var = Norm::empty_channels(input, problem.conv.out_channels);
    if (output.numel() == 0) return {output, activation, mean.zero_(), var.zero_()};
    call.conv.output = activation.mutable_data_ptr();
    call.norm.input = call.conv.output;
    call.norm.mean = mean.mutable_data_ptr();
    call.norm.var = var.mutable_data_ptr();
    call.norm.output = output.mutable_data_ptr();
    Device::run("conv_block_train", call, Device::conv_block_train);
    return {output, activation, mean, var};
  }

  static std::tuple<Tensor, Tensor> eval(const Tensor& input, const Tensor& weight,
                                         const MaybeTensor& bias, const Tensor& mean,
                                         const Tensor& var, const MaybeTensor& norm_weight,
                                         const MaybeTensor& norm_bias, IntArrayRef stride,
                                         IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                         double eps, std::string_view order, bool keep_activation,
                                         std::string_view algorithm) {
    const ConvBlockProblem problem =
        check_conv_block_eval(input, weight, bias, mean, var, norm_weight, norm_bias,
                              {stride, padding, dilation, groups}, eps, order);
    const typename Device::Guard guard(input);
    const Operands operands(input, weight, bias, norm_weight, norm_bias);
    const Tensor m = channel_values(mean, sum_type(input));
    const Tensor v = channel_values(var, sum_type(input));
    Call call = operands.describe("conv_block_eval", problem, eps, algorithm);
    const Tensor output = operands.empty_output(problem.conv);
    const Tensor activation =
        keep_activation ? operands.empty_output(problem.conv)
                        : Device::empty({0}, input.scalar_type(), at::MemoryFormat::Contiguous);
    if (output.numel() == 0) return {output, activation};
    call.conv.output = keep_activation ? activation.mutable_data_ptr() : nullptr;
    call.norm.input = call.conv.output;
    call.norm.mean = const_cast<void*>(m.const_data_ptr());
    call.norm.var = const_cast<void*>(v.const_data_ptr());
    call.norm.output = output.mutable_data_ptr();
    Device::run("conv_block_eval", call, Device::conv_block_eval);
    return {output, activation};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_output, const Tensor& activation, const Tensor& mean, const Tensor& var,
      const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps, bool training,
      std::string_view order) {
    Relu relu = Relu::none;
    const BatchNormProblem problem = check_conv_block_backward(
        grad_output, activation, mean, var, norm_weight, norm_bias, eps, training, order, &relu);
    const typename Device::Guard guard(activation);
    const BatchNormGradients grad =
        Norm::gradients("conv_block_backward", problem, grad_output, activation, mean, var,
                        norm_weight, norm_bias, eps, training, relu);
    return {grad.input, grad.input_sum, grad.weight, grad.bias};
  }

  static void register_ops(torch::Library& m) {
    m.impl("conv_block_train", &train);
    m.impl("conv_block_eval", &eval);
    m.impl("conv_block_backward", &backward);
  }

 private:
  // Tensors that a block's kernels read, as they want them. They must live as long as the call.
  struct Operands {
    Operands(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
             const MaybeTensor& norm_weight, const MaybeTensor& norm_bias)
        : format(common_memory_format({input, weight})),
          input(input.contiguous(format)),
          weight(weight.contiguous(format)),
          bias(bias ? bias->contiguous() : Tensor()),
          norm_weight(channel_values(norm_weight, sum_type(input))),
          norm_bias(channel_values(norm_bias, sum_type(input))) {}

    Tensor empty_output(const Conv2dProblem& p) const {
      return Device::empty({p.batch, p.out_channels, p.out_height(), p.out_width()},
                           input.scalar_type(), format);
    }

    Call describe(const char* op, const ConvBlockProblem& problem, double eps,
                  std::string_view algorithm) const {
      Call call{};
      call.conv.problem = problem.conv;
      call.conv.pass = Conv2dPass::forward;
      call.conv.input = input.const_data_ptr();
      call.conv.weight = weight.const_data_ptr();
      call.conv.bias = data_or_null(bias);
      Conv::describe(call.conv, input, format);
      call.algorithm = &Conv::pick(op, call.conv, algorithm);
      call.norm = Norm::describe(problem.norm(), input, format);
      call.norm.weight = data_or_null(norm_weight);
      call.norm.bias = data_or_null(norm_bias);
      call.norm.eps = eps;
      call.norm.relu = problem.relu;
      return call;
    }

    at::MemoryFormat format;
    Tensor input, weight, bias, norm_weight, norm_bias;
  };
};

}  // namespace convext
