// The normalisation as a map of each channel, y = (x - shift) * scale + offset.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/arena.h"

namespace convext::cpu {

// An element of an array that may be absent.
template <class T>
double value_or(const void* data, int64_t i, double absent) {
  return data ? double(static_cast<const T*>(data)[i]) : absent;
}

template <class T>
struct Normalization {
  Normalization(int64_t channels, Arena& arena)
      : shift(arena.take<T>(channels)),
        scale(arena.take<T>(channels)),
        offset(arena.take<T>(channels)) {}

  // By a mean known in double. Subtracting the mean first keeps what digits x has when the mean is
  // large; what rounding the mean to T leaves over goes into the offset.
  void set(int64_t c, double mean, double var, double eps, const void* weight, const void* bias) {
    const double by = value_or<T>(weight, c, 1) / std::sqrt(var + eps);
    shift[c] = T(mean);
    scale[c] = T(by);
    offset[c] = T(value_or<T>(bias, c, 0) - (mean - double(T(mean))) * by);
  }

  T *shift, *scale, *offset;
};

}  // namespace convext::cpu
