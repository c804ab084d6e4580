// What kernels sum up for each channel, and how the threads of a block put their sums together: in
// an order that the number of threads fixes, so that every run gives the same bits.
//
// A tally is a struct of nothing but members of type Tally::Value.
#pragma once

#include "cuda/kernels/device.h"
#include "cuda/kernels/element.h"

namespace convext::cuda {

// A grid of as many blocks, of which kernels know their number by block_number. It may be a little
// larger.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  return blocks <= kMostBlocks ? dim3(blocks) : dim3(kMostBlocks, ceil_div(blocks, kMostBlocks));
}

__device__ __forceinline__ int64_t block_number() {
  return int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
}

// sum + rest = a + b, of which sum is the rounded one (Knuth, "The Art of Computer Programming",
// volume 2, section 4.2.2, theorem B).
template <class S>
__device__ __forceinline__ S add_exactly(S a, S b, S& rest) {
  const S sum = a + b, added = sum - a;
  rest = (a - (sum - added)) + (b - added);
  return sum;
}

// Means, and sums of squared deviations from them, of `count` values in each of K channels. The
// mean is mean + rest: where it is not far from zero it is to be known better than by its own
// roundings.
template <class S, int K>
struct Moments {
  using Value = S;
  S count, mean[K], rest[K], deviation[K];

  // The values of another, which may be none. Pairwise update after Chan, Golub and LeVeque,
  // "Algorithms for Computing the Sample Variance" (1983).
  __device__ __forceinline__ void merge(const Moments& other) {
    const S both = count + other.count;
    const S share = both > 0 ? other.count / both : S(0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const S means = other.mean[k] - mean[k], rests = other.rest[k] - rest[k];
      const S apart = means + rests;
      deviation[k] += multiply_add(apart * (count * share), apart, other.deviation[k]);
      S rounded;
      mean[k] = add_exactly(mean[k], means * share, rounded);
      rest[k] += multiply_add(rests, share, rounded);
    }
    count = both;
  }
};

template <class S, int K>
struct Sums {
  using Value = S;
  S sum[K];

  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) sum[k] += other.sum[k];
  }
};

template <class Tally>
constexpr int kTallyValues = sizeof(Tally) / sizeof(typename Tally::Value);

// Bytes of shared memory that merge_rows wants.
template <class Tally>
constexpr size_t tally_bytes(int threads) {
  return threads * sizeof(Tally);
}

// The block's threads, a power of two, stand in rows of `columns`, a power of two as well. Merges
// the tallies of every column, halves of the rows at a time, and returns a thread its column's.
// The memory is read until the block's next barrier.
template <class Tally>
__device__ __forceinline__ Tally merge_rows(Tally tally, int columns,
                                            typename Tally::Value* shared) {
  using S = typename Tally::Value;
  const int thread = threadIdx.x, threads = blockDim.x;
  // Value by value, so that neighbours meet different banks.
  const auto put = [&](const Tally& from) {
#pragma unroll
    for (int i = 0; i < kTallyValues<Tally>; ++i) {
      shared[i * threads + thread] = reinterpret_cast<const S*>(&from)[i];
    }
  };
  const auto get = [&](int of) {
    Tally to;
#pragma unroll
    for (int i = 0; i < kTallyValues<Tally>; ++i) {
      reinterpret_cast<S*>(&to)[i] = shared[i * threads + of];
    }
    return to;
  };
  put(tally);
  for (int half = threads / 2; half >= columns; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    tally.merge(get(thread + half));
    put(tally);
  }
  __syncthreads();
  return get(thread % columns);
}

}  // namespace convext::cuda
