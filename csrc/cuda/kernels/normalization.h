// The normalisation as a map of each channel, y = (x - shift) * scale + offset, in kernels.
#pragma once

#include "cuda/kernels/element.h"

namespace convext::cuda {

// An element of an array that may be absent.
template <class S>
__device__ __forceinline__ S value_or(const S* data, int64_t i, S absent) {
  return data ? data[i] : absent;
}

__device__ __forceinline__ float square_root(float value) {
  return sqrtf(value);
}
__device__ __forceinline__ double square_root(double value) {
  return sqrt(value);
}

template <class S>
struct Normalization {
  // Of channel c, whose mean is mean + rest. Subtracting the mean first keeps what digits x has
  // when the mean is large; what it leaves over goes into the offset.
  __device__ Normalization(int64_t c, S mean, S rest, S var, S eps, const S* weight, const S* bias)
      : shift(mean),
        scale(value_or(weight, c, S(1)) * (1 / square_root(var + eps))),
        offset(value_or(bias, c, S(0)) - rest * scale) {}

  S shift, scale, offset;
};

// What every thread of a block is to know about its channels, and one thread of each column finds
// out: arrays of a block's channels in shared memory.
template <class S, int K>
struct Coefficients {
  S* shared;
  int columns;

  static constexpr size_t bytes(int arrays, int columns) {
    return sizeof(S) * arrays * columns * K;
  }
  __device__ __forceinline__ S& at(int array, int k) const {
    return shared[(array * columns + int(threadIdx.x) % columns) * K + k];
  }
  __device__ __forceinline__ void read(int array, S (&to)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) to[k] = at(array, k);
  }
};

}  // namespace convext::cuda
