// Moments of the results that a block has in registers, for who normalises them next.
#pragma once

#include "cuda/kernels/gemm_output.h"

namespace convext::cuda {

// The mean of each column of a tile of so many rows, and the sum of its squared deviations from
// that. kSlots threads have values of a column: visit(f) calls f(column, slot, sum) for each column
// that a thread has some of, where sum(of) adds of(value) up for them. All is in a fixed order.
template <int kColumns, int kSlots, class S, class Visit>
__device__ void sum_moments(S (*shared)[kColumns], uint32_t rows, uint32_t columns, S* mean,
                            S* deviation, const Visit& visit) {
  S* const means = shared[kSlots];
  const auto total = [&](uint32_t column) {
    S sum = 0;
    for (int slot = 0; slot < kSlots; ++slot) sum += shared[slot][column];
    return sum;
  };
  __syncthreads();  // who used this memory before has done so
  visit([&](int column, int slot, const auto& sum) {
    shared[slot][column] = sum([](S value) { return value; });
  });
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < kColumns; c += blockDim.x) means[c] = total(c) / S(rows);
  __syncthreads();
  visit([&](int column, int slot, const auto& sum) {
    const S center = means[column];
    shared[slot][column] = sum([&](S value) { return (value - center) * (value - center); });
  });
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < kColumns && c < columns; c += blockDim.x) {
    mean[c] = means[c];
    deviation[c] = total(c);
  }
  __syncthreads();
}

// Where a block's moments go, and of how many rows and columns they are.
template <class S>
struct MomentsOfTile {
  __device__ MomentsOfTile(const Gemm& g, const GemmBlock& block, uint32_t tile_m, uint32_t tile_n)
      : rows(g.m - block.m_tile * tile_m < tile_m ? g.m - block.m_tile * tile_m : tile_m),
        columns(g.n - block.n_tile * tile_n) {
    const int64_t channels = int64_t(g.groups) * g.n;
    mean = static_cast<S*>(g.moments) + block.m_tile * 2 * channels + int64_t(block.group) * g.n +
           block.n_tile * tile_n;
    deviation = mean + channels;
  }

  uint32_t rows, columns;
  S *mean, *deviation;
};

}  // namespace convext::cuda
