#include "cpu/kernels/conv2d_choice.h"

#include <algorithm>

namespace convext::cpu {
namespace {

bool anything(const Conv2dProblem&, Conv2dPass, DType, Layout) {
  return true;
}

// A 4x4 tile of outputs takes 36 products for each pair of channels where a sum takes 144. Maps so
// small that most of a tile lies outside, and channels so few that the transforms, which are paid
// once for each, outweigh the products, lose that again.
bool pays_for_winograd(const Conv2dProblem& p, Conv2dPass, DType, Layout) {
  const bool kernel_fits = p.kernel_height == 3 && p.kernel_width == 3 && p.stride_height == 1 &&
                           p.stride_width == 1 && p.dilation_height == 1 && p.dilation_width == 1;
  return kernel_fits && std::min(p.out_height(), p.out_width()) >= 7 &&
         std::min(p.group_in_channels(), p.group_out_channels()) >= 16;
}

bool is_depthwise(const Conv2dProblem& p, Conv2dPass, DType, Layout) {
  return p.groups > 1 && p.group_in_channels() == 1;
}

// Otherwise direct's lanes may be pixels instead.
bool has_idle_lanes(const Conv2dProblem& p, Conv2dPass pass, DType dtype, Layout layout) {
  return pass == Conv2dPass::backward_input && layout == Layout::nhwc &&
         (dtype == DType::bfloat16 || dtype == DType::float16) && p.group_in_channels() <= 3 &&
         p.group_out_channels() >= 8;
}

constexpr Conv2dChoiceRow kRows[] = {
    {"winograd", pays_for_winograd,
     "allowed, and a 3x3 kernel of stride 1 over enough pixels and channels: a quarter of the "
     "products"},
    {"winograd_2x2", pays_for_winograd,
     "allowed, and a 3x3 kernel of stride 1 over enough pixels and channels: four ninths of the "
     "products"},
    {"depthwise", is_depthwise,
     "one input channel a group: no sum over channels, so that lanes run over groups or pixels"},
    {"im2col", has_idle_lanes,
     "gradient of one to three input channels of 16 bits in channels_last: direct's lanes, which "
     "are "
     "input channels, would mostly idle; a matrix's run over all weights of a filter"},
    {"direct", anything, "nothing above fits: sums products where the operands lie, no matrix"},
};

}  // namespace

bool is_winograd(const Conv2dAlgorithm& algorithm) {
  return std::string_view(algorithm.name).substr(0, 8) == "winograd";
}

Conv2dChoice choose_conv2d_algorithm(const Conv2dCall& call, bool winograd_allowed) {
  for (const Conv2dChoiceRow& row : kRows) {
    const Conv2dAlgorithm* algorithm = find_conv2d_algorithm(row.algorithm);
    if (!algorithm || (is_winograd(*algorithm) && !winograd_allowed)) continue;
    if (!row.fits(call.problem, call.pass, call.dtype, call.layout)) continue;
    if (!algorithm->declines(call)) return {algorithm, row.reason};
  }
  return {nullptr, nullptr};  // not reached: direct, which takes everything, is the last row
}

int conv2d_choice_count() {
  return sizeof kRows / sizeof kRows[0];
}

const Conv2dChoiceRow& conv2d_choice(int index) {
  return kRows[index];
}

}  // namespace convext::cpu
