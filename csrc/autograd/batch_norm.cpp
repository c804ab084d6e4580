// Autograd of batch norm. The first derivative is the op batch_norm_backward. The derivative of
// that one is written out here in ATen's differentiable operations, with the statistics computed
// from input once more, so that it can be differentiated to any order.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/differentiated.h"
#include "autograd/ops.h"
#include "of_type.h"
#include "tensor_args.h"

namespace convext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What the backward of train and of eval share. `parameter` is the index of weight, or of bias
// where weight is absent: absent tensors are not counted.
struct Saved {
  static void save(AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight,
                   const optional<Tensor>& bias, const Tensor& mean, const Tensor& var,
                   double eps) {
    ctx->save_for_backward({input, mean, var, weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    if (bias) ctx->saved_data["bias_type"] = bias->scalar_type();
  }

  // Gradients of (input, weight, bias).
  static variable_list gradients(AutogradContext* ctx, const Tensor& grad_output, size_t parameter,
                                 bool training) {
    const variable_list saved = ctx->get_saved_variables();
    const optional<Tensor> weight = if_defined(saved[3]);
    auto [grad_input, grad_weight, grad_bias] =
        batch_norm_backward(grad_output, saved[0], saved[1], saved[2], weight,
                            ctx->saved_data["eps"].toDouble(), training);
    if (!ctx->needs_input_grad(0)) grad_input = Tensor();
    if (!weight || !ctx->needs_input_grad(parameter)) grad_weight = Tensor();
    const auto bias_type = ctx->saved_data.find("bias_type");
    if (bias_type == ctx->saved_data.end() ||
        !ctx->needs_input_grad(parameter + weight.has_value())) {
      grad_bias = Tensor();
    } else {
      grad_bias = of_type(grad_bias, bias_type->second.toScalarType());
    }
    return {grad_input, grad_weight, grad_bias};
  }
};

}  // namespace

// Not in the anonymous namespace: grad_fn, the profiler and anomaly detection show these names.

struct BatchNormTrain : Function<BatchNormTrain> {
  // mean and var, which have no gradient, leave by the side: results marked as such would be given
  // zeros for gradients all the same, and compiled autograd asserts that there are none.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight,
                        const optional<Tensor>& bias, double eps, Tensor* mean, Tensor* var) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output;
    std::tie(output, *mean, *var) = batch_norm_train(input, weight, bias, eps);
    Saved::save(ctx, input, weight, bias, *mean, *var, eps);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list grad = Saved::gradients(ctx, grads[0], 1, true);
    return {grad[0], grad[1], grad[2], {}, {}, {}};
  }
};

struct BatchNormEval : Function<BatchNormEval> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& mean,
                        const Tensor& var, const optional<Tensor>& weight,
                        const optional<Tensor>& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    Saved::save(ctx, input, weight, bias, mean, var, eps);
    return batch_norm_eval(input, mean, var, weight, bias, eps);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list grad = Saved::gradients(ctx, grads[0], 3, false);
    return {grad[0], {}, {}, grad[1], grad[2], {}};
  }
};

// Its results, with r = 1 / sqrt(var + eps), y = (x - mean) * r and means over the batch:
//
//   grad_input = w r P(g) in training, where P(u) = u - mean(u) - y mean(u y);  w r g otherwise
//   grad_weight = sum(g y),  grad_bias = sum(g)
//
// P is symmetric. For cotangents (v, a, b) of the three results, and in training:
//
//   of g:  w r P(v) + a y + b
//   of w:  sum(r v P(g))
//   of x:  r P(q) - y r^2 w mean(v P(g)),  where q = a g - w r (v mean(g y) + g mean(v y)) is the
//          cotangent of y, and the second term comes from r
struct BatchNormBackward : Function<BatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& mean, const Tensor& var,
                               const optional<Tensor>& weight, double eps, bool training) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input, mean, var, weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["training"] = training;
    auto [grad_input, grad_weight, grad_bias] =
        batch_norm_backward(grad_output, input, mean, var, weight, eps, training);
    return {grad_input, grad_weight, grad_bias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::ScalarType input_type = saved[1].scalar_type();
    const at::ScalarType type = input_type == at::kDouble ? at::kDouble : at::kFloat;
    const double eps = ctx->saved_data["eps"].toDouble();
    std::vector<int64_t> broadcast(saved[1].dim(), 1), others{0};
    broadcast[1] = -1;
    for (int64_t d = 2; d < saved[1].dim(); ++d) others.push_back(d);
    const auto per_channel = [&](const Tensor& t) { return t.to(type).reshape(broadcast); };
    const auto mean = [&](const Tensor& t) { return t.mean(others, /*keepdim=*/true); };

    const Tensor g = saved[0].to(type), x = saved[1].to(type), v = grads[0].to(type);
    const Tensor a = per_channel(grads[1]), b = per_channel(grads[2]);
    const Tensor w = saved[4].defined() ? per_channel(saved[4]) : at::ones({}, x.options());
    Tensor of_g, of_x, of_w;
    if (ctx->saved_data["training"].toBool()) {
      const Tensor d = x - mean(x);
      const Tensor r = (mean(d * d) + eps).rsqrt();
      const Tensor y = d * r;
      const auto P = [&](const Tensor& u) { return u - mean(u) - y * mean(u * y); };
      const Tensor v_P_g = v * P(g);
      const Tensor q = a * g - w * r * (v * mean(g * y) + g * mean(v * y));
      of_g = w * r * P(v) + a * y + b;
      of_x = r * P(q) - y * (r * r * w * mean(v_P_g));
      of_w = v_P_g * r;
    } else {
      const Tensor r = (per_channel(saved[3]) + eps).rsqrt();
      of_g = w * r * v + a * (x - per_channel(saved[2])) * r + b;
      of_x = a * r * g;
      of_w = v * g * r;
    }
    of_w = saved[4].defined() ? of_w.sum(others).to(saved[4].scalar_type()) : Tensor();
    return {of_g.to(input_type), of_x.to(input_type), {}, {}, of_w, {}, {}};
  }
};

namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_train_autograd(const Tensor& input,
                                                             const optional<Tensor>& weight,
                                                             const optional<Tensor>& bias,
                                                             double eps) {
  check_kind("batch_norm_train", "input", input);
  if (!any_differentiated(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return batch_norm_train(input, weight, bias, eps);
  }
  Tensor mean, var;
  const Tensor output = BatchNormTrain::apply(input, weight, bias, eps, &mean, &var);
  return {output, mean, var};
}

Tensor batch_norm_eval_autograd(const Tensor& input, const Tensor& mean, const Tensor& var,
                                const optional<Tensor>& weight, const optional<Tensor>& bias,
                                double eps) {
  check_kind("batch_norm_eval", "input", input);
  check_kind("batch_norm_eval", "mean", mean);
  check_kind("batch_norm_eval", "var", var);
  if (!any_differentiated(input, mean, var, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return batch_norm_eval(input, mean, var, weight, bias, eps);
  }
  return BatchNormEval::apply(input, mean, var, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_autograd(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const optional<Tensor>& weight, double eps, bool training) {
  check_kind("batch_norm_backward", "grad_output", grad_output);
  check_kind("batch_norm_backward", "input", input);
  check_kind("batch_norm_backward", "mean", mean);
  check_kind("batch_norm_backward", "var", var);
  if (!any_differentiated(grad_output, input, mean, var, weight)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return batch_norm_backward(grad_output, input, mean, var, weight, eps, training);
  }
  const variable_list results =
      BatchNormBackward::apply(grad_output, input, mean, var, weight, eps, training);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, Autograd, m) {
  m.impl("batch_norm_train", &batch_norm_train_autograd);
  m.impl("batch_norm_eval", &batch_norm_eval_autograd);
  m.impl("batch_norm_backward", &batch_norm_backward_autograd);
}

}  // namespace convext
