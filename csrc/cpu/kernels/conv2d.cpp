#include "cpu/kernels/conv2d.h"

namespace convext::cpu {
namespace {

const char* does_all(const Conv2dCall&) {
  return nullptr;
}

const char* is_depthwise(const Conv2dCall& call) {
  return call.problem.groups == call.problem.in_channels
             ? nullptr
             : "depthwise convolution has as many groups as input channels";
}

constexpr Conv2dAlgorithm kAlgorithms[] = {
    // Sums products where the operands lie. The same bits on every ISA; fastest on small layers.
    {"direct", does_all, conv2d_direct},
    // Writes the convolution's matrix out, in blocks, and multiplies by our GEMM.
    {"im2col", does_all, conv2d_im2col},
    // One channel a filter: lanes across channels, nothing summed over them.
    {"depthwise", is_depthwise, conv2d_depthwise},
    // A quarter, or 4/9, of the multiplications; errors are larger (see conv2d_winograd.cpp).
    {"winograd", winograd_declines, conv2d_winograd},
    {"winograd_2x2", winograd_declines, conv2d_winograd_2x2},
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

}  // namespace convext::cpu
