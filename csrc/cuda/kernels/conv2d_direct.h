// What the kernels of "direct" share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/element.h"

namespace convext::cuda {

// Distances between neighbours along each axis, in elements.
template <class Index>
struct Strides {
  Index n, c, h, w;

  static Strides of(Layout layout, int64_t channels, int64_t height, int64_t width) {
    const int64_t image = channels * height * width;
    if (layout == Layout::nchw) {
      return {Index(image), Index(height * width), Index(width), Index(1)};
    }
    return {Index(image), Index(1), Index(width * channels), Index(channels)};
  }
  static Strides of_input(const Conv2dCall& call) {
    const Conv2dProblem& p = call.problem;
    return of(call.layout, p.in_channels, p.in_height, p.in_width);
  }
  static Strides of_output(const Conv2dCall& call) {
    const Conv2dProblem& p = call.problem;
    return of(call.layout, p.out_channels, p.out_height(), p.out_width());
  }
  static Strides of_weight(const Conv2dCall& call) {
    const Conv2dProblem& p = call.problem;
    return of(call.layout, p.group_in_channels(), p.kernel_height, p.kernel_width);
  }
};

// Whether every offset and coordinate of a problem has 31 bits, the ends of tiles beyond included.
inline bool fits_31_bits(const Conv2dProblem& p) {
  constexpr int64_t kMost = (int64_t(1) << 31) - (1 << 14);
  return p.batch * p.in_channels * p.in_height * p.in_width < kMost &&
         p.out_pixels() * p.out_channels < kMost && p.out_pixels() < kMost &&
         p.out_channels * p.group_in_channels() * p.kernel_taps() < kMost &&
         p.in_height + 2 * p.padding_height + p.stride_height < kMost &&
         p.in_width + 2 * p.padding_width + p.stride_width < kMost;
}

// Calls f with a zero of the type that holds the problem's indices: 64 bits cost registers, and
// instructions for every address.
template <class F>
void with_index_of(const Conv2dProblem& p, F&& f) {
  fits_31_bits(p) ? f(int32_t()) : f(int64_t());
}

// Blocks beyond what one axis of a grid holds go on along the next; a kernel leaves where its
// block_index() is none of the blocks'.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  return dim3(std::min(blocks, kMost), ceil_div(blocks, kMost));
}
__device__ __forceinline__ int64_t block_index() {
  return blockIdx.y * int64_t(gridDim.x) + blockIdx.x;
}

inline int power_of_two_from(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// As many elements as fill 16 bytes, which one instruction loads or stores.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T element[kCount];
};

// kCount neighbours in shared memory, on a boundary of 16 bytes.
template <int kCount, class T>
__device__ __forceinline__ void load_neighbours(T (&to)[kCount], const T* from) {
  static_assert(kCount % Pack<T>::kCount == 0);
  for (int i = 0; i < kCount; i += Pack<T>::kCount) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
    for (int j = 0; j < Pack<T>::kCount; ++j) to[i + j] = pack.element[j];
  }
}

// Stores the first `count` of neighbours, rounded; all at once where they fill whole packs.
template <class T, int kCount>
__device__ __forceinline__ void store_neighbours(T* to, const Sum<T> (&values)[kCount], int count) {
  constexpr int kPack = Pack<T>::kCount;
  if constexpr (kCount % kPack == 0) {
    if (count >= kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Pack<T>) == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += kPack) {
        Pack<T> pack;
        for (int j = 0; j < kPack; ++j) pack.element[j] = narrow<T>(values[i + j]);
        *reinterpret_cast<Pack<T>*>(to + i) = pack;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) to[i] = narrow<T>(values[i]);
  }
}

// conv2d_direct_gather.cu: forward and backward_input of every problem.
void direct_gather(const Conv2dCall&);

// conv2d_direct_few.cu: forward from few input channels.
bool prefers_few_channels(const Conv2dCall&);
void direct_few_channels(const Conv2dCall&);

// conv2d_direct_weight.cu: backward_weight of every problem.
void direct_weight(const Conv2dCall&, Arena&);

}  // namespace convext::cuda
