// The vector kernels, written once over the type Vec<T> that a simd_*.h file defines. Each
// isa_*.cpp includes this file inside its own namespace and under its own target options, so that
// no function compiled for one ISA can be linked into another.
#pragma once

#define CONVEXT_UNROLL _Pragma("GCC unroll 32")

// ---------------------------------------------------------------------------------------------------
// Gathered matrix product (see GatherTile)

template <class T, int kVectors, int kRows>
void gather_rows(const GatherTile<T>& t) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes;
  const T* row[kRows];
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) row[r] = t.source + t.rows[r];
  const T* init = t.init;
  const T* panel = t.panel;
  bool accumulate = t.accumulate;
  const int64_t chain = chain_length(t.tap_count);
  int64_t i = 0;
  do {
    V sum[kRows][kVectors];
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V start = init ? V::load(init + v * kLanes) : V::zero();
      CONVEXT_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r][v] = start;
    }
    const int64_t end = t.tap_count - i < chain ? t.tap_count : i + chain;
    for (; i < end; ++i, panel += kVectors * kLanes) {
      const int64_t tap = t.taps[i];
      V weight[kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) weight[v] = V::load(panel + v * kLanes);
      CONVEXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V x = V::broadcast(row[r][tap]);
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, weight[v], sum[r][v]);
      }
    }
    CONVEXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      T* out = t.out + (t.out_rows ? t.out_rows[r] : r) * t.ld_out;
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        T* p = out + v * kLanes;
        (accumulate ? add(V::load(p), sum[r][v]) : sum[r][v]).store(p);
      }
    }
    init = nullptr;
    accumulate = true;
  } while (i < t.tap_count);
}

// Calls the instance for this number of rows, 1 to kMost.
template <class T, int kVectors, int kMost>
void gather_dispatch(const GatherTile<T>& t) {
  if constexpr (kMost == 1) {
    gather_rows<T, kVectors, 1>(t);
  } else {
    if (t.row_count == kMost) return gather_rows<T, kVectors, kMost>(t);
    gather_dispatch<T, kVectors, kMost - 1>(t);
  }
}

template <class T>
void gather(const GatherTile<T>& t) {
  if (t.vectors == 2) {
    gather_dispatch<T, 2, kGatherRows2>(t);
  } else {
    gather_dispatch<T, 1, kGatherRows1>(t);
  }
}

// ---------------------------------------------------------------------------------------------------
// GEMM tile

template <class T>
void gemm(int64_t k, const T* a, const T* b, T* c, int64_t ld_c, int rows, int cols,
          bool accumulate) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes;
  constexpr int kCols = kGemmVectors * kLanes;
  T tile[kGemmRows * kCols];  // sums of the chains so far
  const int64_t chain = chain_length(k);
  for (int64_t i = 0; i < k;) {
    V sum[kGemmRows][kGemmVectors];
    CONVEXT_UNROLL
    for (int r = 0; r < kGemmRows; ++r) {
      CONVEXT_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) sum[r][v] = V::zero();
    }
    const bool first = i == 0;
    const int64_t end = k - i < chain ? k : i + chain;
    for (; i < end; ++i, a += kGemmRows, b += kCols) {
      V column[kGemmVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) column[v] = V::load(b + v * kLanes);
      CONVEXT_UNROLL
      for (int r = 0; r < kGemmRows; ++r) {
        const V x = V::broadcast(a[r]);
        CONVEXT_UNROLL
        for (int v = 0; v < kGemmVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
    CONVEXT_UNROLL
    for (int r = 0; r < kGemmRows; ++r) {
      CONVEXT_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) {
        T* p = tile + r * kCols + v * kLanes;
        (first ? sum[r][v] : add(V::load(p), sum[r][v])).store(p);
      }
    }
  }
  if (rows == kGemmRows && cols == kCols) {
    for (int r = 0; r < kGemmRows; ++r) {
      CONVEXT_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) {
        const V sum = V::load(tile + r * kCols + v * kLanes);
        T* p = c + r * ld_c + v * kLanes;
        (accumulate ? add(V::load(p), sum) : sum).store(p);
      }
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < cols; ++j) {
      T& out = c[r * ld_c + j];
      out = accumulate ? out + tile[r * kCols + j] : tile[r * kCols + j];
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Moving data

template <class T>
void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t cols) {
  constexpr int kBlock = kTransposeBlock;
  const int64_t block_rows = rows - rows % kBlock;
  const int64_t block_cols = cols - cols % kBlock;
  for (int64_t r = 0; r < block_rows; r += kBlock) {
    for (int64_t c = 0; c < block_cols; c += kBlock) {
      transpose_block(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < block_rows ? block_cols : 0; c < cols; ++c) {
      to[c * ld_to + r] = from[r * ld_from + c];
    }
  }
}

inline void load(DType dtype, const void* from, int64_t offset, float* to, int64_t n) {
  if (dtype == DType::float32) {
    std::memcpy(to, static_cast<const float*>(from) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from) + offset;
  int64_t i = load_vectors(dtype, half, to, n);
  for (; i < n; ++i) {
    to[i] = dtype == DType::float16 ? float16_to_float(half[i]) : bfloat16_to_float(half[i]);
  }
}

inline void store(const float* from, DType dtype, void* to, int64_t offset, int64_t n) {
  if (dtype == DType::float32) {
    std::memcpy(static_cast<float*>(to) + offset, from, n * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to) + offset;
  int64_t i = store_vectors(from, dtype, half, n);
  for (; i < n; ++i) {
    half[i] = dtype == DType::float16 ? float_to_float16(from[i]) : float_to_bfloat16(from[i]);
  }
}

inline void load(DType, const void* from, int64_t offset, double* to, int64_t n) {
  std::memcpy(to, static_cast<const double*>(from) + offset, n * sizeof(double));
}

inline void store(const double* from, DType, void* to, int64_t offset, int64_t n) {
  std::memcpy(static_cast<double*>(to) + offset, from, n * sizeof(double));
}

#include "cpu/kernels/column_tiles.h"

// constexpr, for a table is read on CPUs that cannot run the code it points to.
template <class T>
constexpr VectorKernels<T> vector_kernels() {
  return {Vec<T>::lanes,
          {kGatherRows1, kGatherRows2},
          gather<T>,
          kGemmRows,
          kGemmVectors * Vec<T>::lanes,
          gemm<T>,
          transpose<T>,
          column_sums<T>,
          column_map<T>,
          load,
          store};
}
