// What tensor cores multiply, as floats.
#pragma once

#include <bit>
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#else
#include <cuda_fp16.h>
#endif

#include "emulator.h"

namespace emulator {

// The hardware does not look at the bits of a float that tf32 has not.
inline float cut_to_tf32(uint32_t bits) {
  return std::bit_cast<float>(bits & ~0x1fffu);
}

// `count` 16-bit numbers, a multiple of 8.
inline void widen(Factor factor, const uint16_t* from, float* to, int count) {
  if (factor == Factor::bfloat16) {
    for (int i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t(from[i]) << 16);
    return;
  }
#if defined(__F16C__)
  for (int i = 0; i < count; i += 8) {
    const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#else
  for (int i = 0; i < count; ++i) {
    __half_raw raw;
    raw.x = from[i];
    to[i] = __half2float(__half(raw));
  }
#endif
}

}  // namespace emulator
