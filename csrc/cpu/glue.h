// What the ops in csrc/device_ops ask of the CPU, and the keys it answers to.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "common/parallel.h"
#include "cpu/autotune.h"
#include "cpu/kernels/conv2d_choice.h"
#include "cpu/kernels/conv_block.h"
#include "cpu/run_kernel.h"

namespace convext::cpu {

struct Device {
  static constexpr const char* kName = "the CPU";

  using Conv2dCall = cpu::Conv2dCall;
  using BatchNormCall = cpu::BatchNormCall;
  using ConvBlockCall = cpu::ConvBlockCall;
  using Conv2dAlgorithm = cpu::Conv2dAlgorithm;
  using Conv2dChoice = cpu::Conv2dChoice;

  static constexpr auto& conv2d_algorithm_count = cpu::conv2d_algorithm_count;
  static constexpr auto& conv2d_algorithm = cpu::conv2d_algorithm;
  static constexpr auto& find_conv2d_algorithm = cpu::find_conv2d_algorithm;
  static constexpr auto& batch_norm_train = cpu::batch_norm_train;
  static constexpr auto& batch_norm_eval = cpu::batch_norm_eval;
  static constexpr auto& batch_norm_backward = cpu::batch_norm_backward;
  static constexpr auto& channel_sum = cpu::channel_sum;
  static constexpr auto& conv_block_train = cpu::conv_block_train;
  static constexpr auto& conv_block_eval = cpu::conv_block_eval;

  // There is one CPU, and it is always the current one.
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  // at::empty without the way through the dispatcher, which may cost as much as a small
  // convolution.
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType type, at::MemoryFormat format) {
    return at::detail::empty_cpu(size, type, /*pin_memory=*/false, format);
  }

  // What a call has to say besides tensors.
  template <class Call>
  static void describe(Call& call) {
    call.isa = &kernels();
    call.threads = num_threads();
  }

  // "auto".
  static Conv2dChoice choose(const char* op, const Conv2dCall& call, bool winograd_allowed) {
    if (MeasuredTimes* times = autotuning()) {
      const Conv2dAlgorithm* fastest = times->fastest(op, call, winograd_allowed);
      if (fastest) return {fastest, "the fastest by the times of convext.autotune()"};
    }
    return choose_conv2d_algorithm(call, winograd_allowed);
  }

  template <class Call>
  static void run(const char* op, const Call& call, void (*kernel)(const Call&, Arena&)) {
    run_kernel(op, call, kernel);
  }
};

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
