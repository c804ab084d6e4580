// Matrix product of operands that lie where they lie (see Multiply). Included by tiles.h.
#pragma once

// Of the two strides of a one is 1, and known to the compiler: kAlong, that of k.
template <class T, int kVectors, int kRows, bool kAlong>
CONVEXT_INLINE void multiply_rows(const Multiply<T>& m, const T* a, T* out, const T* ahead) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes;
  // Three rows share a pointer: the addressing modes of x86 reach them by an index.
  constexpr int kPointers = kAlong ? (kRows + 2) / 3 : 1;
  const int64_t ld = kAlong ? m.a_row_stride : m.a_k_stride;
  const T* base[kPointers];
  CONVEXT_UNROLL
  for (int i = 0; i < kPointers; ++i) base[i] = a + 3 * i * ld;
  const T* b = m.b;
  constexpr int kAhead = 8;  // rows of b that are asked for before they are needed
  V sum[kRows][kVectors];
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
  }
  for (int64_t k = 0; k < m.k; ++k, b += m.ld_b, ahead += 64 / sizeof(T)) {
    __builtin_prefetch(ahead, 0, 2);
    V column[kVectors];
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(b + kAhead * m.ld_b + v * kLanes);
      column[v] = V::load(b + v * kLanes);
    }
    CONVEXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V x = V::broadcast(kAlong ? base[r / 3][r % 3 * ld] : base[0][r]);
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
    }
    CONVEXT_UNROLL
    for (int i = 0; i < kPointers; ++i) base[i] += kAlong ? 1 : ld;
  }
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* p = out + r * m.ld_out + v * kLanes;
      (m.accumulate ? add(V::load(p), sum[r][v]) : sum[r][v]).store(p);
    }
  }
}

// The rows left over, fewer than kRows.
template <class T, int kVectors, int kRows, bool kAlong>
void multiply_rest(const Multiply<T>& m, int rows, const T* a, T* out, const T* ahead) {
  if constexpr (kRows > 1) {
    if (rows == kRows - 1) return multiply_rows<T, kVectors, kRows - 1, kAlong>(m, a, out, ahead);
    multiply_rest<T, kVectors, kRows - 1, kAlong>(m, rows, a, out, ahead);
  }
}

template <class T, int kVectors, int kRows, bool kAlong>
void multiply_all(const Multiply<T>& m) {
  const T* ahead = m.ahead;
  int64_t r = 0;
  for (; r + kRows <= m.rows; r += kRows, ahead += m.k * (64 / sizeof(T))) {
    multiply_rows<T, kVectors, kRows, kAlong>(m, m.a + r * m.a_row_stride, m.out + r * m.ld_out,
                                              ahead);
  }
  multiply_rest<T, kVectors, kRows, kAlong>(m, int(m.rows - r), m.a + r * m.a_row_stride,
                                            m.out + r * m.ld_out, ahead);
}

template <class T>
void multiply(const Multiply<T>& m) {
  if (m.a_k_stride == 1) {
    m.vectors == 2 ? multiply_all<T, 2, kMultiplyRows[1], true>(m)
                   : multiply_all<T, 1, kMultiplyRows[0], true>(m);
  } else {
    m.vectors == 2 ? multiply_all<T, 2, kMultiplyRows[1], false>(m)
                   : multiply_all<T, 1, kMultiplyRows[0], false>(m);
  }
}
