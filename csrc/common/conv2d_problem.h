// A two-dimensional convolution as a value: sizes only, no pointers, PyTorch's conventions. Its
// functions are constexpr so that CUDA kernels may call them.
#pragma once

#include <cstdint>

namespace convext {

// Convolution is bilinear in (input, weight), so three verbs are closed under differentiation: the
// derivative of any one of them is made of the other two.
enum class Conv2dPass { forward, backward_input, backward_weight };

// M x N x K of the matrix product that a pass is, for one group.
struct GemmShape {
  int64_t m, n, k;
};

struct Conv2dProblem {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups;

  // torch.nn.Conv2d's formula; the caller has checked that the dilated kernel fits.
  static constexpr int64_t output_size(int64_t input, int64_t kernel, int64_t stride,
                                       int64_t padding, int64_t dilation) {
    return (input + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }

  constexpr int64_t out_height() const {
    return output_size(in_height, kernel_height, stride_height, padding_height, dilation_height);
  }
  constexpr int64_t out_width() const {
    return output_size(in_width, kernel_width, stride_width, padding_width, dilation_width);
  }
  constexpr int64_t group_in_channels() const { return in_channels / groups; }
  constexpr int64_t group_out_channels() const { return out_channels / groups; }
  constexpr int64_t kernel_taps() const { return kernel_height * kernel_width; }
  constexpr int64_t out_pixels() const { return batch * out_height() * out_width(); }

  // The convolution matrix view: one row per output pixel, one column per weight of a filter.
  constexpr GemmShape gemm(Conv2dPass pass) const {
    const int64_t pixels = out_pixels();
    const int64_t filters = group_out_channels();
    const int64_t taps = group_in_channels() * kernel_taps();
    switch (pass) {
      case Conv2dPass::forward:
        return {pixels, filters, taps};
      case Conv2dPass::backward_input:
        return {pixels, taps, filters};
      default:
        return {filters, taps, pixels};
    }
  }

  bool operator==(const Conv2dProblem&) const = default;
};

}  // namespace convext
