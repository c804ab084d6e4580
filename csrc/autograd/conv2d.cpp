// Autograd of the convolutions. Each verb is bilinear and its derivatives are the other two verbs,
// called through the dispatcher with autograd on: gradients of any order need no further kernel.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/differentiated.h"
#include "autograd/find_op.h"
#include "tensor_args.h"

namespace convext {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
              std::string_view algorithm) {
  static const auto op = find_op<decltype(conv2d)>("convext::conv2d");
  return op.call(input, weight, bias, stride, padding, dilation, groups, algorithm);
}

Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                             SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                             IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  static const auto op = find_op<decltype(conv2d_backward_input)>("convext::conv2d_backward_input");
  return op.call(grad_output, weight, input_size, stride, padding, dilation, groups, algorithm);
}

Tensor conv2d_backward_weight(const Tensor& grad_output, const Tensor& input,
                              SymIntArrayRef weight_size, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  static const auto op =
      find_op<decltype(conv2d_backward_weight)>("convext::conv2d_backward_weight");
  return op.call(grad_output, input, weight_size, stride, padding, dilation, groups, algorithm);
}

Tensor conv2d_backward_bias(const Tensor& grad_output) {
  static const auto op = find_op<decltype(conv2d_backward_bias)>("convext::conv2d_backward_bias");
  return op.call(grad_output);
}

// The integers and the algorithm, which all three verbs share.
struct Settings {
  // One entry for all integers, and none for the usual algorithm: the cost of a small convolution
  // is that of its bookkeeping.
  static void save(AutogradContext* ctx, IntArrayRef stride, IntArrayRef padding,
                   IntArrayRef dilation, int64_t groups, std::string_view algorithm,
                   bool has_bias = false) {
    std::vector<int64_t> all;
    all.reserve(8);
    for (const IntArrayRef pair : {stride, padding, dilation}) {
      // What has another length is refused by the kernel, which runs before any backward.
      all.insert(all.end(), pair.begin(), pair.end());
    }
    all.push_back(groups);
    all.push_back(has_bias);
    ctx->saved_data["settings"] = std::move(all);
    if (algorithm != "auto") ctx->saved_data["algorithm"] = std::string(algorithm);
  }

  explicit Settings(AutogradContext* ctx)
      : all(ctx->saved_data["settings"].toIntVector()),
        stride(all.data(), 2),
        padding(all.data() + 2, 2),
        dilation(all.data() + 4, 2),
        groups(all[6]),
        has_bias(all[7]) {
    const auto named = ctx->saved_data.find("algorithm");
    if (named != ctx->saved_data.end()) algorithm = named->second.toStringRef();
  }
  Settings(const Settings&) = delete;  // the pairs point into `all`

  std::vector<int64_t> all;
  IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool has_bias;
  std::string algorithm = "auto";

  Tensor forward(const Tensor& input, const Tensor& weight) const {
    return conv2d(input, weight, std::nullopt, stride, padding, dilation, groups, algorithm);
  }
  Tensor backward_input(const Tensor& grad_output, const Tensor& weight,
                        SymIntArrayRef size) const {
    return conv2d_backward_input(grad_output, weight, size, stride, padding, dilation, groups,
                                 algorithm);
  }
  Tensor backward_weight(const Tensor& grad_output, const Tensor& input,
                         SymIntArrayRef size) const {
    return conv2d_backward_weight(grad_output, input, size, stride, padding, dilation, groups,
                                  algorithm);
  }
};

struct Conv2d : Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, weight});
    Settings::save(ctx, stride, padding, dilation, groups, algorithm, bias.has_value());
    return conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Settings settings(ctx);
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
    Settings::save(ctx, stride, padding, dilation, groups, algorithm);
    return conv2d_backward_input(grad_output, weight, input_size, stride, padding, dilation, groups,
                                 algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Settings settings(ctx);
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
    Settings::save(ctx, stride, padding, dilation, groups, algorithm);
    return conv2d_backward_weight(grad_output, input, weight_size, stride, padding, dilation,
                                  groups, algorithm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Settings settings(ctx);
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
