#include "cuda/kernels/conv2d.h"

namespace convext::cuda {
namespace {

const char* does_all(const Conv2dCall&) {
  return nullptr;
}

constexpr Conv2dAlgorithm kAlgorithms[] = {
    // Sums products where the operands lie.
    {"direct", does_all, conv2d_direct, false},
    // One channel a filter: nothing summed over channels, each operand read once.
    {"depthwise", depthwise_declines, conv2d_depthwise, false},
    // Writes the convolution matrix out, a piece at a time, and multiplies it.
    {"im2col", conv2d_im2col_declines, conv2d_im2col, false},
    // Multiplies the convolution matrix without writing it out.
    {"implicit_gemm", conv2d_implicit_gemm_declines, conv2d_implicit_gemm, true},
};

}  // namespace

int conv2d_algorithm_count() {
  return sizeof kAlgorithms / sizeof kAlgorithms[0];
}

const Conv2dAlgorithm& conv2d_algorithm(int index) {
  return kAlgorithms[index];
}

const Conv2dAlgorithm* find_conv2d_algorithm(std::string_view name) {
  for (const Conv2dAlgorithm& algorithm : kAlgorithms) {
    if (name == algorithm.name) return &algorithm;
  }
  return nullptr;
}

}  // namespace convext::cuda
