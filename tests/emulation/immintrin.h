// Stands in for the compiler's <immintrin.h>: SIMD Everywhere (Debian's libsimde-dev) implements
// the AVX-512 intrinsics in terms of what the machine has, so that isa_avx512.cpp runs on any CPU.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
