// What both x86 vector files share: transposes and half-precision conversions in 256-bit vectors.
// Included by simd_avx2.h and simd_avx512.h, inside their namespace.
#pragma once

// Square block of a transpose: to[c][r] = from[r][c].
constexpr int kTransposeBlock = 8;

CONVEXT_INLINE void transpose_block(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 8; i += 2) {  // interleave rows two by two, within 128-bit halves
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // then four by four
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // and join the halves
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

inline void transpose_block(const double* from, int64_t ld_from, double* to, int64_t ld_to) {
  for (int r = 0; r < kTransposeBlock; ++r) {
    for (int c = 0; c < kTransposeBlock; ++c) to[c * ld_to + r] = from[r * ld_from + c];
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
