#include "cpu/kernels/conv2d.h"

namespace convext::cpu {
namespace {

const char* does_all(const Conv2dCall&) {
  return nullptr;
}

constexpr Conv2dAlgorithm kAlgorithms[] = {
    // Sums products where the operands lie. The same bits on every ISA; fastest on small layers.
    {"direct", does_all, conv2d_direct},
    // Writes the convolution's matrix out, in blocks, and multiplies by our GEMM.
    {"im2col", does_all, conv2d_im2col},
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

const Conv2dAlgorithm& choose_conv2d_algorithm(const Conv2dCall& call) {
  // The lanes of backward_input's direct kernel are input channels: with one to three of them (the
  // first layer of a network) most stand idle, while im2col's run over all of a filter's weights.
  const Conv2dProblem& p = call.problem;
  const bool idle_lanes = p.group_in_channels() <= 3 && p.group_out_channels() >= 8;
  const bool wants_columns = call.pass == Conv2dPass::backward_input && idle_lanes;
  return *find_conv2d_algorithm(wants_columns ? "im2col" : "direct");
}

}  // namespace convext::cpu
