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

// Transposes and conversions are bound by memory, where 256-bit vectors do as well.
#include "cpu/kernels/simd_x86.h"

// Rows of the register tiles: accumulators, two weights and a broadcast fill the 32 registers.
constexpr int kGatherRows1 = 24, kGatherRows2 = 14;
constexpr int kGemmRows = 14, kGemmVectors = 2;
