// A build without CUDA kernels says so when it meets a CUDA tensor.
#include <torch/library.h>

#ifndef CONVEXT_CUDA_VERSION

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      "(): this build of convext has no CUDA kernels, and was given a CUDA tensor; move tensors to "
      "the CPU, or build convext anew where nvcc and a CUDA build of torch are found");
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, CUDA, m) {
  for (const char* op :
       {"conv2d", "conv2d_backward_input", "conv2d_backward_weight", "conv2d_backward_bias",
        "batch_norm_train", "batch_norm_eval", "batch_norm_backward", "conv_block_train",
        "conv_block_eval", "conv_block_backward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

#endif  // CONVEXT_CUDA_VERSION
