// What both x86 vector files share, in 256-bit vectors.
// Included by simd_avx2.h and simd_avx512.h, inside their namespace.
#pragma once

// The sum of all lanes, the two halves being added to each other again and again.
CONVEXT_INLINE float sum_lanes(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
CONVEXT_INLINE double sum_lanes(__m256d x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// The square matrix in 8 vectors, transposed: pairs of rows interleaved within 128-bit halves, then
// fours, then the halves joined.
CONVEXT_INLINE void transpose_eight(__m256 (&x)[8]) {
  __m256 pair[8], quad[8];
  CONVEXT_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  CONVEXT_UNROLL
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  CONVEXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

// Converts as many leading elements as vectors cover and returns how many; the rest is the
// caller's.
inline int64_t load_vectors(DType dtype, const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256 wide =
        dtype == DType::float16
            ? _mm256_cvtph_ps(half)
            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    _mm256_storeu_ps(to + i, wide);
  }
  return i;
}

// bfloat16 of eight floats, in the low halves of eight 32-bit lanes (see float_to_bfloat16).
CONVEXT_INLINE __m256i round_to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x0040));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, is_nan);
}

inline int64_t store_vectors(const float* from, DType dtype, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = _mm256_loadu_ps(from + i);
    __m128i half;
    if (dtype == DType::float16) {
      half = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m256i words = round_to_bfloat16(wide);
      half = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  return i;
}
