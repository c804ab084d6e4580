// What the glue of every op on the CPU shares: workspace for a kernel, values for each channel, and
// the keys it answers to.
#pragma once

#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "cpu/kernels/arena.h"

namespace convext::cpu {

// Calls kernel(arena) on a counting arena, allocates what it asked for, and calls it again.
template <class Kernel>
void run_with_workspace(const char* op, const Kernel& kernel) {
  Arena counter(nullptr);
  kernel(counter);
  TORCH_CHECK(!counter.overflowed(), op,
              "(): needs a workspace larger than the address space for this problem");
  const at::DataPtr workspace =
      c10::GetCPUAllocator()->allocate(counter.used() + Arena::kAlignment);
  Arena arena(Arena::aligned(workspace.get()));
  kernel(arena);
}

// The dtype in which kernels add up, and take and give what there is one of for each channel.
inline at::ScalarType sum_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor channel_values(const std::optional<at::Tensor>& values, at::ScalarType type) {
  return values ? values->to(type).contiguous() : at::Tensor();
}

inline at::Tensor empty_channels(const at::Tensor& like, int64_t channels) {
  return at::empty({channels}, like.options().dtype(sum_type(like)));
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
