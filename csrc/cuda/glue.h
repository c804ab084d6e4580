// What the ops in csrc/device_ops ask of CUDA, and the keys it answers to. Of torch's CUDA it uses
// c10/cuda alone, whose headers come with every build of torch: so a machine without CUDA can at
// least compile this.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/conv2d_choice.h"
#include "cuda/kernels/conv_block.h"
#include "cuda/run_kernel.h"

namespace convext::cuda {

struct Device {
  static constexpr const char* kName = "CUDA";

  using Conv2dCall = cuda::Conv2dCall;
  using BatchNormCall = cuda::BatchNormCall;
  using ConvBlockCall = cuda::ConvBlockCall;
  using Conv2dAlgorithm = cuda::Conv2dAlgorithm;
  using Conv2dChoice = cuda::Conv2dChoice;

  static constexpr auto& conv2d_algorithm_count = cuda::conv2d_algorithm_count;
  static constexpr auto& conv2d_algorithm = cuda::conv2d_algorithm;
  static constexpr auto& find_conv2d_algorithm = cuda::find_conv2d_algorithm;
  static constexpr auto& batch_norm_train = cuda::batch_norm_train;
  static constexpr auto& batch_norm_eval = cuda::batch_norm_eval;
  static constexpr auto& batch_norm_backward = cuda::batch_norm_backward;
  static constexpr auto& channel_sum = cuda::channel_sum;
  static constexpr auto& conv_block_train = cuda::conv_block_train;
  static constexpr auto& conv_block_eval = cuda::conv_block_eval;

  // The device of a tensor is the current one for as long as this lives.
  struct Guard {
    explicit Guard(const at::Tensor& tensor) : guard(tensor.device()) {}
    c10::cuda::CUDAGuard guard;
  };

  // at::empty on the current device without the way through the dispatcher.
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType type, at::MemoryFormat format) {
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
    return at::detail::empty_generic(size, c10::cuda::CUDACachingAllocator::get(), keys, type,
                                     format);
  }

  // What a call has to say besides tensors.
  static void describe(Conv2dCall&);
  static void describe(BatchNormCall&);

  // "auto".
  static Conv2dChoice choose(const char* op, const Conv2dCall&, bool winograd_allowed);

  template <class Call>
  static void run(const char* op, const Call& call, void (*kernel)(const Call&, Arena&)) {
    run_kernel(op, call, kernel);
  }
};

}  // namespace convext::cuda

// Registers register_ops(torch::Library&) for CUDA. Sparse, quantized and the like come to the same
// functions, so that tensor_args can say what is wrong with them.
#define CONVEXT_REGISTER_CUDA(register_ops)          \
  TORCH_LIBRARY_IMPL(convext, CUDA, m) {             \
    register_ops(m);                                 \
  }                                                  \
  TORCH_LIBRARY_IMPL(convext, SparseCUDA, m) {       \
    register_ops(m);                                 \
  }                                                  \
  TORCH_LIBRARY_IMPL(convext, SparseCsrCUDA, m) {    \
    register_ops(m);                                 \
  }                                                  \
  TORCH_LIBRARY_IMPL(convext, QuantizedCUDA, m) {    \
    register_ops(m);                                 \
  }                                                  \
  TORCH_LIBRARY_IMPL(convext, NestedTensorCUDA, m) { \
    register_ops(m);                                 \
  }
