// Autograd of the convolutions. Each verb is bilinear and its derivatives are the other two verbs,
// called through the dispatcher with autograd on: gradients of any order need no further kernel.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "autograd/conv2d_saved.h"
#include "autograd/differentiated.h"
#include "autograd/ops.h"
#include "tensor_args.h"

namespace convext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

}  // namespace

// Not in the anonymous namespace: grad_fn, the profiler and anomaly detection show these names.

struct Conv2d : Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, weight});
    Conv2dSaved::save(ctx, stride, padding, dilation, groups, algorithm, bias.has_value());
    return conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Conv2dSaved settings(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    // Once here, not in each of the three: a sum's gradient, say, is an expanded number.
    const Tensor grad = grads[0].contiguous(common_memory_format({input, weight}));
    Tensor grad_input, grad_weight, grad_bias;
    if (ctx->needs_input_grad(0)) {
      grad_input = settings.backward_input(grad, weight, input.sym_sizes());
    }
    if (ctx->needs_input_grad(1)) {
      grad_weight = settings.backward_weight(grad, input, weight.sym_sizes());
    }
    // An absent bias has no index to ask about.
    if (settings.has_bias && ctx->needs_input_grad(2)) grad_bias = conv2d_backward_bias(grad);
    return {grad_input, grad_weight, grad_bias, {}, {}, {}, {}, {}};
  }
};

struct Conv2dBackwardInput : Function<Conv2dBackwardInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& weight,
                        SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, weight});
    Conv2dSaved::save(ctx, stride, padding, dilation, groups, algorithm);
    return conv2d_backward_input(grad_output, weight, input_size, stride, padding, dilation, groups,
                                 algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Conv2dSaved settings(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &weight = saved[1];
    Tensor grad_grad_output, grad_weight;
    if (ctx->needs_input_grad(0)) grad_grad_output = settings.forward(grads[0], weight);
    if (ctx->needs_input_grad(1)) {
      grad_weight = settings.backward_weight(grad_output, grads[0], weight.sym_sizes());
    }
    return {grad_grad_output, grad_weight, {}, {}, {}, {}, {}, {}};
  }
};

struct Conv2dBackwardWeight : Function<Conv2dBackwardWeight> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                        SymIntArrayRef weight_size, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input});
    Conv2dSaved::save(ctx, stride, padding, dilation, groups, algorithm);
    return conv2d_backward_weight(grad_output, input, weight_size, stride, padding, dilation,
                                  groups, algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Conv2dSaved settings(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1];
    Tensor grad_grad_output, grad_input;
    if (ctx->needs_input_grad(0)) grad_grad_output = settings.forward(input, grads[0]);
    if (ctx->needs_input_grad(1)) {
      grad_input = settings.backward_input(grad_output, grads[0], input.sym_sizes());
    }
    return {grad_grad_output, grad_input, {}, {}, {}, {}, {}, {}};
  }
};

// Linear: a sum, whose derivative is a broadcast.
struct Conv2dBackwardBias : Function<Conv2dBackwardBias> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["size"] = grad_output.sym_sizes();
    return conv2d_backward_bias(grad_output);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto size = ctx->saved_data["size"].toSymIntVector();
    return {grads[0].reshape({1, -1, 1, 1}).expand_symint(size)};
  }
};

namespace {

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       int64_t groups, std::string_view algorithm) {
  check_kind("conv2d", "input", input);
  check_kind("conv2d", "weight", weight);
  if (!any_differentiated(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm);
  }
  return Conv2d::apply(input, weight, bias, stride, padding, dilation, groups, algorithm);
}

Tensor conv2d_backward_input_autograd(const Tensor& grad_output, const Tensor& weight,
                                      SymIntArrayRef input_size, IntArrayRef stride,
                                      IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                      std::string_view algorithm) {
  check_kind("conv2d_backward_input", "grad_output", grad_output);
  check_kind("conv2d_backward_input", "weight", weight);
  if (!any_differentiated(grad_output, weight)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv2d_backward_input(grad_output, weight, input_size, stride, padding, dilation, groups,
                                 algorithm);
  }
  return Conv2dBackwardInput::apply(grad_output, weight, input_size, stride, padding, dilation,
                                    groups, algorithm);
}

Tensor conv2d_backward_weight_autograd(const Tensor& grad_output, const Tensor& input,
                                       SymIntArrayRef weight_size, IntArrayRef stride,
                                       IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                       std::string_view algorithm) {
  check_kind("conv2d_backward_weight", "grad_output", grad_output);
  check_kind("conv2d_backward_weight", "input", input);
  if (!any_differentiated(grad_output, input)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv2d_backward_weight(grad_output, input, weight_size, stride, padding, dilation,
                                  groups, algorithm);
  }
  return Conv2dBackwardWeight::apply(grad_output, input, weight_size, stride, padding, dilation,
                                     groups, algorithm);
}

Tensor conv2d_backward_bias_autograd(const Tensor& grad_output) {
  check_kind("conv2d_backward_bias", "grad_output", grad_output);
  if (!any_differentiated(grad_output)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return conv2d_backward_bias(grad_output);
  }
  return Conv2dBackwardBias::apply(grad_output);
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, Autograd, m) {
  m.impl("conv2d", &conv2d_autograd);
  m.impl("conv2d_backward_input", &conv2d_backward_input_autograd);
  m.impl("conv2d_backward_weight", &conv2d_backward_weight_autograd);
  m.impl("conv2d_backward_bias", &conv2d_backward_bias_autograd);
}

}  // namespace convext
