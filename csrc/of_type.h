#pragma once

#include <ATen/core/Tensor.h>

namespace convext {

// tensor.to(type), without the way through the dispatcher where there is nothing to do.
inline at::Tensor of_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

}  // namespace convext
