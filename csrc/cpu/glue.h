// What the glue of every op on the CPU shares: results, values for each channel, and the keys it
// answers to.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include "cpu/run_kernel.h"
#include "of_type.h"

namespace convext::cpu {

// at::empty without the way through the dispatcher, which may cost as much as a small convolution.
inline at::Tensor empty_output(at::IntArrayRef size, const at::Tensor& like,
                               at::MemoryFormat format) {
  return at::detail::empty_cpu(size, like.scalar_type(), /*pin_memory=*/false, format);
}

// The dtype in which kernels add up, and take and give what there is one of for each channel.
inline at::ScalarType sum_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor channel_values(const std::optional<at::Tensor>& values, at::ScalarType type) {
  return values ? of_type(*values, type).contiguous() : at::Tensor();
}

inline at::Tensor empty_channels(const at::Tensor& like, int64_t channels) {
  return at::detail::empty_cpu({channels}, sum_type(like), /*pin_memory=*/false);
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace convext::cpu

// Registers register_ops(torch::Library&) for the CPU. Sparse, quantized and the like come to the
// same functions, so that tensor_args can say what is wrong with them.
#define CONVEXT_REGISTER_CPU(register_ops)          \
  TORCH_LIBRARY_IMPL(convext, CPU, m) {             \
    register_ops(m);                                \
  }                                                 \
  TORCH_LIBRARY_IMPL(convext, SparseCPU, m) {       \
    register_ops(m);                                \
  }                                                 \
  TORCH_LIBRARY_IMPL(convext, SparseCsrCPU, m) {    \
    register_ops(m);                                \
  }                                                 \
  TORCH_LIBRARY_IMPL(convext, QuantizedCPU, m) {    \
    register_ops(m);                                \
  }                                                 \
  TORCH_LIBRARY_IMPL(convext, MkldnnCPU, m) {       \
    register_ops(m);                                \
  }                                                 \
  TORCH_LIBRARY_IMPL(convext, NestedTensorCPU, m) { \
    register_ops(m);                                \
  }
