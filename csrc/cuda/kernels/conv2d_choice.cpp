#include "cuda/kernels/conv2d_choice.h"

#include <algorithm>

namespace convext::cuda {
namespace {

bool anything(const Conv2dProblem&, DType) {
  return true;
}

bool is_depthwise(const Conv2dProblem& p, DType) {
  return p.groups > 1 && p.group_in_channels() == 1;
}

// A product's tile has 64 or 128 rows and columns. With fewer channels than a vector of a tensor
// core has, most of it is padding; and it takes so many results, or products to split among blocks,
// until there is a tile for every multiprocessor. By the forward pass, so that the passes of a
// layer go together: the lesson's layers stay below at any batch up to 512, those of networks for
// photographs above.
bool is_large_product(const Conv2dProblem& p, DType) {
  constexpr int64_t kChannels = 8;
  constexpr double kResults = 1 << 19, kProducts = 1 << 26;
  const double results = double(p.out_pixels()) * double(p.out_channels);
  const double products = results * double(p.group_in_channels()) * double(p.kernel_taps());
  return std::min(p.group_in_channels(), p.group_out_channels()) >= kChannels &&
         (results >= kResults || products >= kProducts);
}

bool is_large_product_but_float64(const Conv2dProblem& p, DType dtype) {
  return dtype != DType::float64 && is_large_product(p, dtype);
}

constexpr Conv2dChoiceRow kRows[] = {
    {"depthwise", is_depthwise,
     "one input channel a group: no sum over channels, so that each operand is read once"},
    {"implicit_gemm", is_large_product_but_float64,
     "enough channels and results for tiles of a matrix product, whose matrix is not written out"},
    {"im2col", is_large_product,
     "enough channels and results for tiles of a matrix product, in float64 or where implicit_gemm "
     "declines: of a matrix that is written out"},
    {"direct", anything,
     "nothing above fits: few channels or a small problem, of which each thread sums a few results "
     "where the operands lie"},
};

}  // namespace

Conv2dChoice choose_conv2d_algorithm(const Conv2dCall& call, bool) {
  for (const Conv2dChoiceRow& row : kRows) {
    const Conv2dAlgorithm* algorithm = find_conv2d_algorithm(row.algorithm);
    if (!algorithm || !row.fits(call.problem, call.dtype)) continue;
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

}  // namespace convext::cuda
