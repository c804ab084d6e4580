// Whether autograd has anything to do in a call. Where it has not, as in every first backward pass,
// an op goes straight to its kernel: a node costs more than a small convolution.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace convext {

inline bool is_differentiated(const at::Tensor& tensor) {
  // A forward-mode tangent must reach the Function, which refuses it: never a silent zero.
  return tensor.defined() && ((at::GradMode::is_enabled() && tensor.requires_grad()) ||
                              tensor._fw_grad(/*level=*/0).defined());
}

inline bool is_differentiated(const std::optional<at::Tensor>& tensor) {
  return tensor && is_differentiated(*tensor);
}

template <class... Tensors>
bool any_differentiated(const Tensors&... tensors) {
  return (is_differentiated(tensors) || ...);
}

}  // namespace convext
