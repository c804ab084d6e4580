// Compiles what stands between CONVEXT_TARGET_BEGIN and CONVEXT_TARGET_END for an instruction set
// that the rest of the build does not assume, so that one set of compiler flags serves the
// extension and a wheel runs on any CPU. Standard headers must be included before it: an inline
// function of theirs compiled with wider instructions could be the copy that the linker keeps for
// everybody.
#pragma once

#define CONVEXT_PRAGMA(x) _Pragma(#x)
#define CONVEXT_INLINE inline __attribute__((always_inline))
#define CONVEXT_UNROLL _Pragma("GCC unroll 32")

#if defined(CONVEXT_EMULATE_SIMD)  // tests: intrinsics come from a library of plain code
#define CONVEXT_TARGET_BEGIN(options)
#define CONVEXT_TARGET_END
#define CONVEXT_CPU_HAS(feature) true
#elif defined(__clang__)
#define CONVEXT_TARGET_BEGIN(options) \
  CONVEXT_PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define CONVEXT_TARGET_END CONVEXT_PRAGMA(clang attribute pop)
#else
#define CONVEXT_TARGET_BEGIN(options) \
  CONVEXT_PRAGMA(GCC push_options) CONVEXT_PRAGMA(GCC target(options))
#define CONVEXT_TARGET_END CONVEXT_PRAGMA(GCC pop_options)
#endif

// Whether this CPU and its operating system have a feature.
#if !defined(CONVEXT_CPU_HAS)
#define CONVEXT_CPU_HAS(feature) __builtin_cpu_supports(feature)
#endif
