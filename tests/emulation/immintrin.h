// Stands in for the compiler's <immintrin.h>: SIMD Everywhere (Debian's libsimde-dev) implements
// the AVX-512 intrinsics in terms of what the machine has, so that isa_avx512.cpp runs on any CPU.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// Missing from the library's release 0.7.4. Reads no more than the mask allows, as the CPU does.
template <class Vector, class T>
inline Vector load_masked(unsigned mask, const void* from) {
  T lanes[sizeof(Vector) / sizeof(T)] = {};
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) lanes[i] = static_cast<const T*>(from)[i];
  }
  Vector result;
  __builtin_memcpy(&result, lanes, sizeof result);
  return result;
}
// Likewise writes no more.
template <class T, class Vector>
inline void store_masked(void* to, unsigned mask, Vector vector) {
  T lanes[sizeof(Vector) / sizeof(T)];
  __builtin_memcpy(lanes, &vector, sizeof lanes);
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) static_cast<T*>(to)[i] = lanes[i];
  }
}
#define _mm512_mask_storeu_ps(to, mask, vector) store_masked<float>(to, mask, vector)
#define _mm512_mask_storeu_pd(to, mask, vector) store_masked<double>(to, mask, vector)
#define _mm512_maskz_loadu_ps(mask, from) load_masked<__m512, float>(mask, from)
#define _mm512_maskz_loadu_pd(mask, from) load_masked<__m512d, double>(mask, from)

// Two 128-bit quarters of each operand, by two bits of the choice for each.
inline __m512 shuffle_quarters(__m512 a, __m512 b, int choice) {
  float from[32], to[16];
  __builtin_memcpy(from, &a, sizeof a);
  __builtin_memcpy(from + 16, &b, sizeof b);
  for (int i = 0; i < 4; ++i) {
    const int quarter = (choice >> 2 * i & 3) + (i < 2 ? 0 : 4);
    __builtin_memcpy(to + 4 * i, from + 4 * quarter, 16);
  }
  __m512 result;
  __builtin_memcpy(&result, to, sizeof result);
  return result;
}
#define _mm512_shuffle_f32x4(a, b, choice) shuffle_quarters(a, b, choice)
