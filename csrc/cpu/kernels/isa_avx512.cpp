#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/half.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/target.h"

// GCC 12 warns of its own intrinsics, whose unused operands it leaves undefined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

CONVEXT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
namespace convext::cpu::avx512 {
namespace {
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/tiles.h"
}  // namespace
}  // namespace convext::cpu::avx512
CONVEXT_TARGET_END

namespace convext::cpu {

const IsaKernels& avx512_kernels() {
  static constexpr IsaKernels table{
      "avx512",
      [] {
        return CONVEXT_CPU_HAS("avx512f") && CONVEXT_CPU_HAS("avx512bw") &&
               CONVEXT_CPU_HAS("avx512dq") && CONVEXT_CPU_HAS("avx512vl") &&
               avx2_kernels().runs_here();
      },
      avx512::vector_kernels<float>(), avx512::vector_kernels<double>()};
  return table;
}

}  // namespace convext::cpu

#endif  // __x86_64__
