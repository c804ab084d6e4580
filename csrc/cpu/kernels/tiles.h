// The vector kernels, written once over the type Vec<T> that a simd_*.h file defines. Each
// isa_*.cpp includes this file inside its own namespace and under its own target options, so that
// no function compiled for one ISA can be linked into another.
#pragma once

// Asks for a cache line. No address is a wrong one.
CONVEXT_INLINE void prefetch(const void* line) {
  __builtin_prefetch(line, 0);
}
CONVEXT_INLINE void prefetch_to_write(const void* line) {
  __builtin_prefetch(line, 1);
}

// ---------------------------------------------------------------------------------------------------
// Gathered matrix product (see GatherTile)

// In order where the panel's rows are: a list fewer leaves a register more for addresses of rows.
template <class T, int kVectors, int kRows, bool kInOrder>
void gather_rows(const GatherTile<T>& t) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes;
  const T* row[kRows];
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) row[r] = t.source + t.rows[r];
  const T* init = t.init;
  const T* row_init = t.row_init;
  bool accumulate = t.accumulate;
  const T* next = t.panel;
  int64_t i = 0;
  do {
    V sum[kRows][kVectors];
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V start = init ? V::load(init + v * kLanes) : V::zero();
      CONVEXT_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r][v] = row_init ? V::broadcast(row_init[r]) : start;
    }
    const int64_t end = t.tap_count - i < t.chain ? t.tap_count : i + t.chain;
    for (; i < end; ++i) {
      const int64_t tap = t.taps[i];
      const T* panel = kInOrder ? next : t.panel + t.panel_rows[i] * t.ld_panel;
      next += t.ld_panel;
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
    init = row_init = nullptr;
    accumulate = true;
  } while (i < t.tap_count);
}

// Calls the instance for this number of rows, 1 to kMost.
template <class T, int kVectors, bool kInOrder, int kMost = kGatherRows[kVectors - 1]>
void gather_dispatch(const GatherTile<T>& t) {
  if constexpr (kMost == 1) {
    gather_rows<T, kVectors, 1, kInOrder>(t);
  } else {
    if (t.row_count == kMost) return gather_rows<T, kVectors, kMost, kInOrder>(t);
    gather_dispatch<T, kVectors, kInOrder, kMost - 1>(t);
  }
}

template <class T, int kVectors = kMostVectors>
void gather(const GatherTile<T>& t) {
  if constexpr (kVectors > 1) {
    if (t.vectors < kVectors) return gather<T, kVectors - 1>(t);
  }
  t.panel_rows ? gather_dispatch<T, kVectors, false>(t) : gather_dispatch<T, kVectors, true>(t);
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
  const int64_t chain = pixel_chain(k);
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
void transpose_block(const T* from, int64_t ld_from, T* to, int64_t ld_to, int rows, int cols) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) to[c * ld_to + r] = from[r * ld_from + c];
  }
}

#if defined(CONVEXT_TRANSPOSE_SQUARE)
// Through registers, a square at a time. Further squares are asked for along the rows on either
// side: the rows of one are often some elements of many channels, too short for the hardware to
// foresee.
inline void transpose_block(const float* from, int64_t ld_from, float* to, int64_t ld_to, int rows,
                            int cols) {
  using V = Vec<float>;
  V square[V::lanes];
  if (rows == V::lanes && cols == V::lanes) {
    CONVEXT_UNROLL
    for (int i = 0; i < V::lanes; ++i) {
      prefetch(from + i * ld_from + 3 * V::lanes);
      square[i] = V::load(from + i * ld_from);
    }
    transpose_square(square);
    CONVEXT_UNROLL
    for (int i = 0; i < V::lanes; ++i) {
      square[i].store(to + i * ld_to);
      prefetch_to_write(to + i * ld_to + 2 * V::lanes);
    }
    return;
  }
  CONVEXT_UNROLL
  for (int i = 0; i < V::lanes; ++i) {
    square[i] = i < rows ? V::load_first(from + i * ld_from, cols) : V::zero();
  }
  transpose_square(square);
  CONVEXT_UNROLL
  for (int i = 0; i < V::lanes; ++i) {
    if (i < cols) square[i].store_first(to + i * ld_to, rows);
  }
}
#endif

template <class T>
void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t cols) {
  constexpr int64_t kBlock = Vec<T>::lanes;
#if defined(CONVEXT_TRANSPOSE_EIGHT)
  if constexpr (std::is_same_v<T, float>) {
    if (rows <= 8) {
      for (int64_t c = 0; c < cols; c += 8) {
        transpose_eight(from + c, ld_from, to + c * ld_to, ld_to, int(rows),
                        int(cols - c < 8 ? cols - c : 8));
      }
      return;
    }
  }
#endif
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int block_rows = int(rows - r < kBlock ? rows - r : kBlock);
    for (int64_t c = 0; c < cols; c += kBlock) {
      transpose_block(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to, block_rows,
                      int(cols - c < kBlock ? cols - c : kBlock));
    }
  }
}

// Rows of n elements, `from_step` and `to_step` elements apart. They are short: what depends on n
// is told before the loops.
template <class T>
void copy_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t n) {
  using V = Vec<T>;
  if (n < V::lanes) {
    for (int64_t r = 0; r < rows; ++r, from += from_step, to += to_step) {
      V::load_first(from, int(n)).store_first(to, int(n));
    }
    return;
  }
  const int64_t last = n - V::lanes;  // the last vector overlaps the one before
  for (int64_t r = 0; r < rows; ++r, from += from_step, to += to_step) {
    for (int64_t i = 0; i < last; i += V::lanes) V::load(from + i).store(to + i);
    V::load(from + last).store(to + last);
  }
}

// Rows whose elements go to two phases in turn, the first of them to even[0].
template <class T>
void split_rows(const T* from, int64_t from_step, T* even, T* odd, int64_t to_step, int64_t rows,
                int64_t n) {
  using V = Vec<T>;
  constexpr int64_t kPair = 2 * V::lanes;
  const int64_t whole = (n - 1) / kPair * kPair;
  const int rest = int(n - whole);  // 1 to kPair
  const int low_count = rest < V::lanes ? rest : V::lanes, high_count = rest - low_count;
  const int evens = (rest + 1) / 2, odds = rest / 2;
  for (int64_t r = 0; r < rows; ++r, from += from_step, even += to_step, odd += to_step) {
    for (int64_t i = 0; i < whole; i += kPair) {
      V low = V::load(from + i), high = V::load(from + i + V::lanes);
      deinterleave(low, high);
      low.store(even + i / 2);
      high.store(odd + i / 2);
    }
    V low = V::load_first(from + whole, low_count);
    V high = high_count > 0 ? V::load_first(from + whole + V::lanes, high_count) : V::zero();
    deinterleave(low, high);
    low.store_first(even + whole / 2, evens);
    high.store_first(odd + whole / 2, odds);
  }
}

template <class T>
void scatter_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t n,
                  const PhasedAxis& cols, int64_t first_phase) {
  for (int64_t r = 0; r < rows; ++r, from += from_step, to += to_step) {
    int64_t phase = first_phase, place = 0;
    for (int64_t i = 0; i < n; ++i) {
      to[phase * cols.phase_step + place] = from[i];
      if (++phase == cols.phases) phase = 0, ++place;
    }
  }
}

// One phase of the rows after the other, so that the loops over rows have constant steps.
template <class T>
void phased_copy(const PhasedCopy<T>& c) {
  if (c.rows == 0 || c.cols == 0) return;
  const PhasedAxis rows = c.row, cols = c.col;
  const int64_t col_phase = cols.phases == 1 ? 0 : c.first_col % cols.phases;
  const int64_t first_col = cols.offset(c.first_col) - col_phase * cols.phase_step;
  const int64_t from_step = rows.phases * c.ld_from;
  for (int64_t p = 0; p < c.planes; ++p) {
    for (int64_t phase = 0; phase < rows.phases && phase < c.rows; ++phase) {
      const T* from = c.from + p * c.from_plane + phase * c.ld_from;
      T* to = c.to + p * c.to_plane + rows.offset(c.first_row + phase) + first_col;
      const int64_t count = rows.phases == 1 ? c.rows : ceil_div(c.rows - phase, rows.phases);
      if (cols.phases == 1) {
        copy_rows(from, from_step, to, rows.step, count, c.cols);
      } else if (cols.phases == 2) {
        T* odd = col_phase ? to + 1 : to + cols.phase_step;
        split_rows(from, from_step, to + col_phase * cols.phase_step, odd, rows.step, count,
                   c.cols);
      } else {
        scatter_rows(from, from_step, to, rows.step, count, c.cols, cols, col_phase);
      }
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
#include "cpu/kernels/depthwise_plane_tiles.h"
#include "cpu/kernels/depthwise_tiles.h"
#include "cpu/kernels/multiply_tile.h"
#include "cpu/kernels/panel_tile.h"
#include "cpu/kernels/peak_tile.h"
#include "cpu/kernels/span_tiles.h"
#include "cpu/kernels/winograd_tiles.h"

// constexpr, for a table is read on CPUs that cannot run the code it points to.
template <class T>
constexpr VectorKernels<T> vector_kernels() {
  return {Vec<T>::lanes,
          kMostVectors,
          {kGatherRows[0], kGatherRows[1], kGatherRows[2], kGatherRows[3]},
          gather<T>,
          kGemmRows,
          kGemmVectors * Vec<T>::lanes,
          gemm<T>,
          transpose<T>,
          phased_copy<T>,
          multiply<T>,
          winograd<T>,
          column_sums<T>,
          column_map<T>,
          span_sums<T>,
          span_map<T>,
          load,
          store,
          depthwise_pixels<T>,
          depthwise_weights<T>,
          fma_loop<T>,
          depthwise_planes<T>,
          depthwise_plane_weights<T>,
          copy_planes<T>,
          interleave_rows<T>,
          kPanelRows,
          kPanelVectors,
          panel_tile<T>,
          panel_copy<T>};
}
