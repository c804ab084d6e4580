// Portable C++: runs everywhere, the reference for the others, and slow where the CPU has no FMA.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/half.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/target.h"

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
