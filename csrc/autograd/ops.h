// The ops as C++ functions that go through the dispatcher: autograd, autocast, modes and all.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace convext {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;
using std::optional;

// A typed handle of an op. Look it up once: keep it static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Tensor conv2d(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                     std::string_view algorithm) {
  static const auto op = find_op<decltype(conv2d)>("convext::conv2d");
  return op.call(input, weight, bias, stride, padding, dilation, groups, algorithm);
}

inline Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                                    SymIntArrayRef input_size, IntArrayRef stride,
                                    IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                    std::string_view algorithm) {
  static const auto op = find_op<decltype(conv2d_backward_input)>("convext::conv2d_backward_input");
  return op.call(grad_output, weight, input_size, stride, padding, dilation, groups, algorithm);
}

inline Tensor conv2d_backward_weight(const Tensor& grad_output, const Tensor& input,
                                     SymIntArrayRef weight_size, IntArrayRef stride,
                                     IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                     std::string_view algorithm) {
  static const auto op =
      find_op<decltype(conv2d_backward_weight)>("convext::conv2d_backward_weight");
  return op.call(grad_output, input, weight_size, stride, padding, dilation, groups, algorithm);
}

inline Tensor conv2d_backward_bias(const Tensor& grad_output) {
  static const auto op = find_op<decltype(conv2d_backward_bias)>("convext::conv2d_backward_bias");
  return op.call(grad_output);
}

inline std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input,
                                                           const optional<Tensor>& weight,
                                                           const optional<Tensor>& bias,
                                                           double eps) {
  static const auto op = find_op<decltype(batch_norm_train)>("convext::batch_norm_train");
  return op.call(input, weight, bias, eps);
}

inline Tensor batch_norm_eval(const Tensor& input, const Tensor& mean, const Tensor& var,
                              const optional<Tensor>& weight, const optional<Tensor>& bias,
                              double eps) {
  static const auto op = find_op<decltype(batch_norm_eval)>("convext::batch_norm_eval");
  return op.call(input, mean, var, weight, bias, eps);
}

inline std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output,
                                                              const Tensor& input,
                                                              const Tensor& mean, const Tensor& var,
                                                              const optional<Tensor>& weight,
                                                              double eps, bool training) {
  static const auto op = find_op<decltype(batch_norm_backward)>("convext::batch_norm_backward");
  return op.call(grad_output, input, mean, var, weight, eps, training);
}

inline void update_running_statistics(const optional<Tensor>& running_mean,
                                      const optional<Tensor>& running_var, const Tensor& mean,
                                      const Tensor& var, const at::Scalar& momentum,
                                      const at::Scalar& var_momentum) {
  static const auto op =
      find_op<decltype(update_running_statistics)>("convext::update_running_statistics");
  op.call(running_mean, running_var, mean, var, momentum, var_momentum);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_train(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
    std::string_view algorithm) {
  static const auto op = find_op<decltype(conv_block_train)>("convext::conv_block_train");
  return op.call(input, weight, bias, norm_weight, norm_bias, stride, padding, dilation, groups,
                 eps, order, algorithm);
}

inline std::tuple<Tensor, Tensor> conv_block_eval(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& var, const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps,
    std::string_view order, bool keep_activation, std::string_view algorithm) {
  static const auto op = find_op<decltype(conv_block_eval)>("convext::conv_block_eval");
  return op.call(input, weight, bias, mean, var, norm_weight, norm_bias, stride, padding, dilation,
                 groups, eps, order, keep_activation, algorithm);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& grad_output, const Tensor& activation, const Tensor& mean, const Tensor& var,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, double eps,
    bool training, std::string_view order) {
  static const auto op = find_op<decltype(conv_block_backward)>("convext::conv_block_backward");
  return op.call(grad_output, activation, mean, var, norm_weight, norm_bias, eps, training, order);
}

// What saved undefined tensors stand for.
inline optional<Tensor> if_defined(const Tensor& tensor) {
  return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt;
}

}  // namespace convext
