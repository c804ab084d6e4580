// Element types and memory layouts, as the kernels of every device see them.
#pragma once

#include <cstdint>

namespace convext {

enum class DType { float32, float64, bfloat16, float16 };

// Where the channels lie: nchw is PyTorch's contiguous format, nhwc its channels_last. Weights
// follow the same rule with (N, C, H, W) read as (out_channels, in_channels / groups, kH, kW).
enum class Layout { nchw, nhwc };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace convext
