// From the sums in a thread's registers to memory: an epilogue, a rounding and a place.
#pragma once

#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/gemm.h"

namespace convext::cuda {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T of[kCount];
};

// What blockIdx.x is of a product. Blocks of one tile of rows follow each other, for these are an
// image's pixels, which are many, and filters are few.
struct GemmBlock {
  uint32_t n_tile, group, m_tile, split;

  __device__ static GemmBlock of(const Gemm& g, uint32_t index) {
    GemmBlock block;
    block.n_tile = index % g.tiles_n, index /= g.tiles_n;
    block.group = index % g.groups, index /= g.groups;
    block.m_tile = index % g.tiles_m, block.split = index / g.tiles_m;
    return block;
  }
};

inline dim3 gemm_grid(const Gemm& g) {
  return dim3(g.tiles_n * g.groups * g.tiles_m * g.splits);
}

template <class T>
class GemmWriter {
 public:
  __device__ GemmWriter(const Gemm& g, const Epilogue<T>& epilogue, uint32_t group, uint32_t split)
      : g_(g),
        epilogue_(epilogue),
        done_(g.moments),
        first_channel_(int64_t(group) * g.n),
        sums_(g.sums
                  ? static_cast<Sum<T>*>(g.sums) + (int64_t(split) * g.groups + group) * g.m * g.n
                  : nullptr),
        to_(static_cast<T*>(g.out.to) + group * g.out.group) {}

  __device__ bool along_rows() const { return !sums_ && g_.out.along_rows; }

  __device__ void store(uint32_t m, uint32_t n, Sum<T> sum) const {
    if (m >= g_.m || n >= g_.n) return;
    if (sums_) {
      sums_[int64_t(m) * g_.n + n] = sum;
    } else {
      put(g_.out.rows.at(m), n, sum);
    }
  }

  // Neighbours of a row, the first of which is a multiple of kCount.
  template <int kCount>
  __device__ void store_columns(uint32_t m, uint32_t n, const Sum<T> (&sums)[kCount]) const {
    if (m >= g_.m || n >= g_.n) return;
    if (sums_) {
      Sum<T>* to = sums_ + int64_t(m) * g_.n + n;
      if (g_.n % kCount == 0) {
        Vector<Sum<T>, kCount> vector;
#pragma unroll
        for (int e = 0; e < kCount; ++e) vector.of[e] = sums[e];
        *reinterpret_cast<Vector<Sum<T>, kCount>*>(to) = vector;
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          if (n + e < g_.n) to[e] = sums[e];
        }
      }
      return;
    }
    const Place row = g_.out.rows.at(m);
    if (g_.out.vectors_of_columns && n + kCount <= g_.n) {
      const Place column = g_.out.columns.at(n);
      if (!g_.out.holds(row, column)) return;
      Vector<T, kCount> vector;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        vector.of[e] = finish(sums[e], n + e);
      }
      *reinterpret_cast<Vector<T, kCount>*>(to_ + row.offset + column.offset) = vector;
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) put(row, n + e, sums[e]);
    }
  }

  // Neighbours of a column, the first of which is a multiple of kCount.
  template <int kCount>
  __device__ void store_rows(uint32_t m, uint32_t n, const Sum<T> (&sums)[kCount]) const {
    if (m >= g_.m || n >= g_.n) return;
    if (g_.out.vectors_of_rows && m + kCount <= g_.m && !sums_) {
      const Place row = g_.out.rows.at(m), column = g_.out.columns.at(n);
      if (!g_.out.holds(row, column)) return;
      Vector<T, kCount> vector;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        vector.of[e] = finish(sums[e], n);
      }
      *reinterpret_cast<Vector<T, kCount>*>(to_ + row.offset + column.offset) = vector;
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) store(m + e, n, sums[e]);
    }
  }

 private:
  __device__ T finish(Sum<T> sum, uint32_t n) const {
    return narrow<T>(done_ ? sum : epilogue_(sum, first_channel_ + n));
  }

  __device__ void put(const Place& row, uint32_t n, Sum<T> sum) const {
    const Place column = g_.out.columns.at(n);
    if (!g_.out.holds(row, column)) return;
    to_[row.offset + column.offset] = finish(sum, n);
  }

  const Gemm& g_;
  const Epilogue<T>& epilogue_;
  bool done_;  // whether sums have come through the epilogue
  int64_t first_channel_;
  Sum<T>* sums_;
  T* to_;
};

}  // namespace convext::cuda
