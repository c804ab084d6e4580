// The vector type on AVX2 + FMA + F16C. Included by isa_avx2.cpp only.
#pragma once

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  CONVEXT_INLINE static Vec zero() { return {_mm256_setzero_ps()}; }
  CONVEXT_INLINE static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  CONVEXT_INLINE static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  CONVEXT_INLINE static Vec load_first(const float* p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
  }
  CONVEXT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  __m256d v;

  CONVEXT_INLINE static Vec zero() { return {_mm256_setzero_pd()}; }
  CONVEXT_INLINE static Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }
  CONVEXT_INLINE static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  CONVEXT_INLINE static Vec load_first(const double* p, int n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return {_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane))};
  }
  CONVEXT_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
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

#include "cpu/kernels/simd_x86.h"

// Rows of the register tiles: accumulators, two weights and a broadcast fill the 16 registers.
constexpr int kGatherRows1 = 12, kGatherRows2 = 6;
constexpr int kGemmRows = 6, kGemmVectors = 2;
