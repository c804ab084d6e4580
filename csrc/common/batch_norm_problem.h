// A batch norm as a value: sizes only, no pointers. It takes (N, C, *), of which * matters only by
// its product.
#pragma once

#include <cstdint>

namespace convext {

// Where a ReLU stands that is computed together with a batch norm.
enum class Relu { none, before_norm, after_norm };

struct BatchNormProblem {
  int64_t batch, channels, pixels;

  // Values that a channel's statistics are made of.
  constexpr int64_t count() const { return batch * pixels; }
  constexpr int64_t elements() const { return count() * channels; }

  bool operator==(const BatchNormProblem&) const = default;
};

}  // namespace convext
