// Tensors as kernels take them, whichever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "of_type.h"

namespace convext {

// The dtype in which kernels add up, and take and give what there is one of for each channel.
inline at::ScalarType sum_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor channel_values(const std::optional<at::Tensor>& values, at::ScalarType type) {
  return values ? of_type(*values, type).contiguous() : at::Tensor();
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace convext
