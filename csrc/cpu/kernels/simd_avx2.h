// The vector type on AVX2 + FMA + F16C. Included by isa_avx2.cpp only.
#pragma once

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  CONVEXT_INLINE static __m256i first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  }

  CONVEXT_INLINE static Vec zero() { return {_mm256_setzero_ps()}; }
  CONVEXT_INLINE static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  CONVEXT_INLINE static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  CONVEXT_INLINE static Vec load_first(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n))};
  }
  CONVEXT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  CONVEXT_INLINE void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  __m256d v;

  CONVEXT_INLINE static __m256i first(int n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane);
  }

  CONVEXT_INLINE static Vec zero() { return {_mm256_setzero_pd()}; }
  CONVEXT_INLINE static Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }
  CONVEXT_INLINE static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  CONVEXT_INLINE static Vec load_first(const double* p, int n) {
    return {_mm256_maskload_pd(p, first(n))};
  }
  CONVEXT_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  CONVEXT_INLINE void store_first(double* p, int n) const { _mm256_maskstore_pd(p, first(n), v); }
};

// a * b + c in one rounding
CONVEXT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
CONVEXT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
CONVEXT_INLINE Vec<float> add(Vec<float> a, Vec<float> b) {
  return {_mm256_add_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> add(Vec<double> a, Vec<double> b) {
  return {_mm256_add_pd(a.v, b.v)};
}
CONVEXT_INLINE Vec<float> sub(Vec<float> a, Vec<float> b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> sub(Vec<double> a, Vec<double> b) {
  return {_mm256_sub_pd(a.v, b.v)};
}

CONVEXT_INLINE Vec<float> mul(Vec<float> a, Vec<float> b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
CONVEXT_INLINE Vec<double> mul(Vec<double> a, Vec<double> b) {
  return {_mm256_mul_pd(a.v, b.v)};
}
// The first n lanes, and zeros in the others.
CONVEXT_INLINE Vec<float> first_lanes(Vec<float> a, int n) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(Vec<float>::first(n)))};
}
CONVEXT_INLINE Vec<double> first_lanes(Vec<double> a, int n) {
  return {_mm256_and_pd(a.v, _mm256_castsi256_pd(Vec<double>::first(n)))};
}
// max(a, 0), and NaN where a is: the instruction returns its second operand then.
CONVEXT_INLINE Vec<float> relu(Vec<float> a) {
  return {_mm256_max_ps(_mm256_setzero_ps(), a.v)};
}
CONVEXT_INLINE Vec<double> relu(Vec<double> a) {
  return {_mm256_max_pd(_mm256_setzero_pd(), a.v)};
}
// a, with zeros where gate <= 0.
CONVEXT_INLINE Vec<float> keep_positive(Vec<float> a, Vec<float> gate) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(gate.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}
CONVEXT_INLINE Vec<double> keep_positive(Vec<double> a, Vec<double> gate) {
  return {_mm256_and_pd(a.v, _mm256_cmp_pd(gate.v, _mm256_setzero_pd(), _CMP_NLE_UQ))};
}

// The even and the odd elements of the two vectors, one after the other.
CONVEXT_INLINE void deinterleave(Vec<float>& low, Vec<float>& high) {
  const __m256 even = _mm256_shuffle_ps(low.v, high.v, 0x88);
  const __m256 odd = _mm256_shuffle_ps(low.v, high.v, 0xdd);
  low.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  high.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
}
CONVEXT_INLINE void deinterleave(Vec<double>& low, Vec<double>& high) {
  const __m256d even = _mm256_unpacklo_pd(low.v, high.v);
  const __m256d odd = _mm256_unpackhi_pd(low.v, high.v);
  low.v = _mm256_permute4x64_pd(even, 0xd8);
  high.v = _mm256_permute4x64_pd(odd, 0xd8);
}

// The inverse.
CONVEXT_INLINE void interleave(Vec<float>& even, Vec<float>& odd) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  even.v = _mm256_permute2f128_ps(low, high, 0x20);
  odd.v = _mm256_permute2f128_ps(low, high, 0x31);
}
CONVEXT_INLINE void interleave(Vec<double>& even, Vec<double>& odd) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  even.v = _mm256_permute2f128_pd(low, high, 0x20);
  odd.v = _mm256_permute2f128_pd(low, high, 0x31);
}

#include "cpu/kernels/simd_x86.h"

#define CONVEXT_TRANSPOSE_SQUARE
CONVEXT_INLINE void transpose_square(Vec<float> (&x)[8]) {
  __m256 square[8];
  CONVEXT_UNROLL
  for (int i = 0; i < 8; ++i) square[i] = x[i].v;
  transpose_eight(square);
  CONVEXT_UNROLL
  for (int i = 0; i < 8; ++i) x[i].v = square[i];
}

CONVEXT_INLINE float sum_lanes(Vec<float> a) {
  return sum_lanes(a.v);
}
CONVEXT_INLINE double sum_lanes(Vec<double> a) {
  return sum_lanes(a.v);
}

// Rows of the register tiles: accumulators, two weights and a broadcast fill the 16 registers.
constexpr int kMostVectors = 2;
constexpr int kGatherRows[4] = {12, 6};
constexpr int kMultiplyRows[2] = {12, 6};
constexpr int kGemmRows = 6, kGemmVectors = 2;
constexpr int kPanelRows = 4, kPanelVectors = 3;
constexpr int kDepthwisePixels = 8, kDepthwiseVectors = 1;
constexpr int kPlaneRows = 4, kPlaneVectors = 2, kPlaneTapRows = 1;
