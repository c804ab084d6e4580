// Autograd of the fused block: one node for convolution, ReLU and batch norm. Its gradients come
// from one fused op and the convolution's own; where they are to be differentiated again, from the
// separate ops, which can be, to any order.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/conv2d_saved.h"
#include "autograd/differentiated.h"
#include "autograd/ops.h"
#include "of_type.h"
#include "tensor_args.h"

namespace convext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The parameters of a block that may be absent.
struct Parameters {
  const optional<Tensor>&bias, &norm_weight, &norm_bias;
};

// A forward pass as its backward sees it.
struct SavedBlock {
  static void save(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                   const Parameters& p, const Tensor& activation, const Tensor& mean,
                   const Tensor& var, double eps, std::string_view order) {
    ctx->save_for_backward({input, weight, activation, mean, var, p.bias.value_or(Tensor()),
                            p.norm_weight.value_or(Tensor()), p.norm_bias.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["order"] = std::string(order);
  }

  SavedBlock(AutogradContext* ctx, bool training)
      : tensors(ctx->get_saved_variables()),
        input(tensors[0]),
        weight(tensors[1]),
        activation(tensors[2]),
        mean(tensors[3]),
        var(tensors[4]),
        bias(if_defined(tensors[5])),
        norm_weight(if_defined(tensors[6])),
        norm_bias(if_defined(tensors[7])),
        eps(ctx->saved_data["eps"].toDouble()),
        order(ctx->saved_data["order"].toStringRef()),
        training(training),
        conv(ctx) {}

  // Gradients of (the convolution's result, bias, norm_weight, norm_bias).
  std::tuple<Tensor, Tensor, Tensor, Tensor> through_norm_and_relu(const Tensor& grad) const {
    if (!at::GradMode::is_enabled()) {
      return conv_block_backward(grad, activation, mean, var, norm_weight, norm_bias, eps, training,
                                 order);
    }
    // The same of differentiable parts, which takes the forward pass again: `activation` was
    // computed out of autograd's sight.
    const Tensor z = conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation,
                            conv.groups, conv.algorithm);
    Tensor grad_conv, grad_norm_weight, grad_norm_bias;
    if (order == "conv-relu-norm") {
      const Tensor a = at::relu(z);
      std::tie(grad_conv, grad_norm_weight, grad_norm_bias) =
          batch_norm_backward(grad, a, mean, var, norm_weight, eps, training);
      grad_conv = at::threshold_backward(grad_conv, a, 0);
    } else {
      const Tensor n = training ? std::get<0>(batch_norm_train(z, norm_weight, norm_bias, eps))
                                : batch_norm_eval(z, mean, var, norm_weight, norm_bias, eps);
      std::tie(grad_conv, grad_norm_weight, grad_norm_bias) = batch_norm_backward(
          at::threshold_backward(grad, n, 0), z, mean, var, norm_weight, eps, training);
    }
    return {grad_conv, conv2d_backward_bias(grad_conv), grad_norm_weight, grad_norm_bias};
  }

  // Gradients of (input, weight, bias, norm_weight, norm_bias). `given` is how many tensors stand
  // between bias and norm_weight in the forward pass.
  variable_list gradients(AutogradContext* ctx, const Tensor& grad_output, int64_t given) const {
    const Tensor grad = grad_output.contiguous(common_memory_format({input, weight}));
    auto [grad_conv, grad_bias, grad_norm_weight, grad_norm_bias] = through_norm_and_relu(grad);
    variable_list result(5);
    if (ctx->needs_input_grad(0)) {
      result[0] = conv.backward_input(grad_conv, weight, input.sym_sizes());
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = conv.backward_weight(grad_conv, input, weight.sym_sizes());
    }
    // Absent tensors have no index to ask about.
    size_t next = 2;
    const auto keep = [&](const optional<Tensor>& parameter, const Tensor& gradient) {
      if (!parameter || !ctx->needs_input_grad(next++)) return Tensor();
      return of_type(gradient, parameter->scalar_type());
    };
    result[2] = keep(bias, grad_bias);
    next += given;
    result[3] = keep(norm_weight, grad_norm_weight);
    result[4] = keep(norm_bias, grad_norm_bias);
    return result;
  }

  const variable_list tensors;
  const Tensor &input, &weight, &activation, &mean, &var;
  const optional<Tensor> bias, norm_weight, norm_bias;
  const double eps;
  const std::string order;
  const bool training;
  const Conv2dSaved conv;
};

}  // namespace

// Not in the anonymous namespace: grad_fn, the profiler and anomaly detection show these names.

struct ConvBlockTrain : Function<ConvBlockTrain> {
  // What has no gradient leaves by the side, see BatchNormTrain.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, const optional<Tensor>& norm_weight,
                        const optional<Tensor>& norm_bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
                        std::string_view algorithm, Tensor* activation, Tensor* mean, Tensor* var) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output;
    std::tie(output, *activation, *mean, *var) =
        conv_block_train(input, weight, bias, norm_weight, norm_bias, stride, padding, dilation,
                         groups, eps, order, algorithm);
    SavedBlock::save(ctx, input, weight, {bias, norm_weight, norm_bias}, *activation, *mean, *var,
                     eps, order);
    Conv2dSaved::save(ctx, stride, padding, dilation, groups, algorithm);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list g = SavedBlock(ctx, /*training=*/true).gradients(ctx, grads[0], 0);
    return {g[0], g[1], g[2], g[3], g[4], {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct ConvBlockEval : Function<ConvBlockEval> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, const Tensor& mean, const Tensor& var,
                        const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        int64_t groups, double eps, std::string_view order,
                        std::string_view algorithm, Tensor* activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output;
    std::tie(output, *activation) =
        conv_block_eval(input, weight, bias, mean, var, norm_weight, norm_bias, stride, padding,
                        dilation, groups, eps, order, /*keep_activation=*/true, algorithm);
    SavedBlock::save(ctx, input, weight, {bias, norm_weight, norm_bias}, *activation, mean, var,
                     eps, order);
    Conv2dSaved::save(ctx, stride, padding, dilation, groups, algorithm);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list g = SavedBlock(ctx, /*training=*/false).gradients(ctx, grads[0], 2);
    return {g[0], g[1], g[2], {}, {}, g[3], g[4], {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_train_autograd(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
    std::string_view algorithm) {
  check_kind("conv_block_train", "input", input);
  check_kind("conv_block_train", "weight", weight);
  if (!any_differentiated(input, weight, bias, norm_weight, norm_bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv_block_train(input, weight, bias, norm_weight, norm_bias, stride, padding, dilation,
                            groups, eps, order, algorithm);
  }
  Tensor activation, mean, var;
  const Tensor output =
      ConvBlockTrain::apply(input, weight, bias, norm_weight, norm_bias, stride, padding, dilation,
                            groups, eps, order, algorithm, &activation, &mean, &var);
  return {output, activation, mean, var};
}

std::tuple<Tensor, Tensor> conv_block_eval_autograd(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& var, const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps,
    std::string_view order, bool keep_activation, std::string_view algorithm) {
  check_kind("conv_block_eval", "input", input);
  check_kind("conv_block_eval", "weight", weight);
  check_kind("conv_block_eval", "mean", mean);
  check_kind("conv_block_eval", "var", var);
  if (!any_differentiated(input, weight, bias, mean, var, norm_weight, norm_bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv_block_eval(input, weight, bias, mean, var, norm_weight, norm_bias, stride, padding,
                           dilation, groups, eps, order, keep_activation, algorithm);
  }
  Tensor activation;
  const Tensor output =
      ConvBlockEval::apply(input, weight, bias, mean, var, norm_weight, norm_bias, stride, padding,
                           dilation, groups, eps, order, algorithm, &activation);
  return {output, activation};
}

// A part of a backward pass, and no more: SavedBlock takes other ops where more is asked.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_backward_autograd(
    const Tensor& grad_output, const Tensor& activation, const Tensor& mean, const Tensor& var,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, double eps,
    bool training, std::string_view order) {
  TORCH_CHECK(!any_differentiated(grad_output, activation, mean, var, norm_weight, norm_bias),
              "conv_block_backward(): is not differentiable; the gradients of conv_block_train and "
              "conv_block_eval are");
  at::AutoDispatchBelowADInplaceOrView below;
  return conv_block_backward(grad_output, activation, mean, var, norm_weight, norm_bias, eps,
                             training, order);
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, Autograd, m) {
  m.impl("conv_block_train", &conv_block_train_autograd);
  m.impl("conv_block_eval", &conv_block_eval_autograd);
  m.impl("conv_block_backward", &conv_block_backward_autograd);
}

}  // namespace convext
