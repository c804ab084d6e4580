#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/half.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/target.h"

CONVEXT_TARGET_BEGIN("avx2,fma,f16c,prfchw")
namespace convext::cpu::avx2 {
namespace {
#include "cpu/kernels/simd_avx2.h"
#include "cpu/kernels/tiles.h"
}  // namespace
}  // namespace convext::cpu::avx2
CONVEXT_TARGET_END

namespace convext::cpu {

const IsaKernels& avx2_kernels() {
  static constexpr IsaKernels table{
      "avx2",
      [] { return CONVEXT_CPU_HAS("avx2") && CONVEXT_CPU_HAS("fma") && CONVEXT_CPU_HAS("f16c"); },
      avx2::vector_kernels<float>(), avx2::vector_kernels<double>()};
  return table;
}

}  // namespace convext::cpu

#endif  // __x86_64__
