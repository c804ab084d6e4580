// The vector type on AVX-512 (F, BW, DQ, VL). Included by isa_avx512.cpp only.
#pragma once

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;

  CONVEXT_INLINE static Vec zero() { return {_mm512_setzero_ps()}; }
  CONVEXT_INLINE static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  CONVEXT_INLINE static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  CONVEXT_INLINE static Vec load_first(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
  }
  CONVEXT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  CONVEXT_INLINE void store_first(float* p, int n) const {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  __m512d v;

  CONVEXT_INLINE static Vec zero() { return {_mm512_setzero_pd()}; }
  CONVEXT_INLINE static Vec broadcast(double x) { return {_mm512_set1_pd(x)}; }
  CONVEXT_INLINE static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  CONVEXT_INLINE static Vec load_first(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p)};
  }
  CONVEXT_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  CONVEXT_INLINE void store_first(double* p, int n) const {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
  }
};

// a * b + c in one rounding
CONVEXT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
CONVEXT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
CONVEXT_INLINE Vec<float> add(Vec<float> a, Vec<float> b) {
  return {_mm512_add_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> add(Vec<double> a, Vec<double> b) {
  return {_mm512_add_pd(a.v, b.v)};
}
CONVEXT_INLINE Vec<float> sub(Vec<float> a, Vec<float> b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> sub(Vec<double> a, Vec<double> b) {
  return {_mm512_sub_pd(a.v, b.v)};
}

CONVEXT_INLINE Vec<float> mul(Vec<float> a, Vec<float> b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> mul(Vec<double> a, Vec<double> b) {
  return {_mm512_mul_pd(a.v, b.v)};
}
// The first n lanes, and zeros in the others.
CONVEXT_INLINE Vec<float> first_lanes(Vec<float> a, int n) {
  return {_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), a.v)};
}
CONVEXT_INLINE Vec<double> first_lanes(Vec<double> a, int n) {
  return {_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), a.v)};
}
// max(a, 0), and NaN where a is. By a mask, for GCC 12 warns of its own max intrinsics.
CONVEXT_INLINE Vec<float> relu(Vec<float> a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLT_UQ), a.v)};
}
CONVEXT_INLINE Vec<double> relu(Vec<double> a) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NLT_UQ), a.v)};
}
// a, with zeros where gate <= 0.
CONVEXT_INLINE Vec<float> keep_positive(Vec<float> a, Vec<float> gate) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate.v, _mm512_setzero_ps(), _CMP_NLE_UQ), a.v)};
}
CONVEXT_INLINE Vec<double> keep_positive(Vec<double> a, Vec<double> gate) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(gate.v, _mm512_setzero_pd(), _CMP_NLE_UQ), a.v)};
}

// The even and the odd elements of the two vectors, one after the other.
CONVEXT_INLINE void deinterleave(Vec<float>& low, Vec<float>& high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 a = low.v, b = high.v;
  low.v = _mm512_permutex2var_ps(a, even, b);
  high.v = _mm512_permutex2var_ps(a, odd, b);
}
CONVEXT_INLINE void deinterleave(Vec<double>& low, Vec<double>& high) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd = _mm512_add_epi64(even, _mm512_set1_epi64(1));
  const __m512d a = low.v, b = high.v;
  low.v = _mm512_permutex2var_pd(a, even, b);
  high.v = _mm512_permutex2var_pd(a, odd, b);
}

// The inverse.
CONVEXT_INLINE void interleave(Vec<float>& even, Vec<float>& odd) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 a = even.v, b = odd.v;
  even.v = _mm512_permutex2var_ps(a, first, b);
  odd.v = _mm512_permutex2var_ps(a, second, b);
}
CONVEXT_INLINE void interleave(Vec<double>& even, Vec<double>& odd) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(4));
  const __m512d a = even.v, b = odd.v;
  even.v = _mm512_permutex2var_pd(a, first, b);
  odd.v = _mm512_permutex2var_pd(a, second, b);
}

// The square matrix in 16 vectors, transposed: pairs of rows interleaved, then fours, then the
// 128-bit quarters exchanged twice.
#define CONVEXT_TRANSPOSE_SQUARE
CONVEXT_INLINE void transpose_square(Vec<float> (&x)[16]) {
  __m512 pair[16], quad[16];
  CONVEXT_UNROLL
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  CONVEXT_UNROLL
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  CONVEXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    x[i + 4].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    x[i + 12].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

// Conversions are bound by memory, where 256-bit vectors do as well.
#include "cpu/kernels/simd_x86.h"

// Squares of eight, for matrices with eight rows or fewer: what is there of them, by masks.
#define CONVEXT_TRANSPOSE_EIGHT
inline void transpose_eight(const float* from, int64_t ld_from, float* to, int64_t ld_to, int rows,
                            int cols) {
  const __mmask16 row_mask = __mmask16((1u << rows) - 1), col_mask = __mmask16((1u << cols) - 1);
  __m256 x[8];
  CONVEXT_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = i < rows ? _mm512_castps512_ps256(_mm512_maskz_loadu_ps(col_mask, from + i * ld_from))
                    : _mm256_setzero_ps();
  }
  transpose_eight(x);
  CONVEXT_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < cols) _mm512_mask_storeu_ps(to + i * ld_to, row_mask, _mm512_castps256_ps512(x[i]));
  }
}

// By masks, see relu.
CONVEXT_INLINE double sum_lanes(Vec<double> a) {
  return sum_lanes(
      _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_maskz_extractf64x4_pd(0xf, a.v, 1)));
}
CONVEXT_INLINE float sum_lanes(Vec<float> a) {
  const __m512d pairs = _mm512_castps_pd(a.v);
  const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, pairs, 1));
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256(a.v), high));
}

// Rows of the register tiles. A gather tile takes an address register for each of its rows, of
// which there are fewer than vector registers.
constexpr int kMostVectors = 4;
constexpr int kGatherRows[4] = {12, 12, 8, 6};
constexpr int kMultiplyRows[2] = {24, 14};
constexpr int kGemmRows = 14, kGemmVectors = 2;
constexpr int kPanelRows = 8, kPanelVectors = 3;
constexpr int kDepthwisePixels = 6, kDepthwiseVectors = 2;
constexpr int kPlaneRows = 4, kPlaneVectors = 1, kPlaneTapRows = 3;
