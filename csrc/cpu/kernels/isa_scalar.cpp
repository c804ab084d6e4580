// Portable C++: runs everywhere, the reference for the others, and slow where the CPU has no FMA.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/half.h"
#include "cpu/kernels/isa.h"

// In place of target.h's: there are no registers for whole tiles to stay in, and four lanes of each
// vector written out everywhere would take minutes to compile.
#define CONVEXT_INLINE inline
#define CONVEXT_UNROLL

namespace convext::cpu {
namespace scalar {
namespace {
#include "cpu/kernels/simd_scalar.h"
#include "cpu/kernels/tiles.h"
}  // namespace
}  // namespace scalar

const IsaKernels& scalar_kernels() {
  static constexpr IsaKernels table{"scalar", [] { return true; }, scalar::vector_kernels<float>(),
                                    scalar::vector_kernels<double>()};
  return table;
}

}  // namespace convext::cpu
