// What this machine does at best, for a benchmark to measure by: arithmetic with nothing to load,
// and copies with nothing to compute. The two limits of a roofline (Williams, Waterman and
// Patterson, "Roofline: an insightful visual performance model", 2009).
#pragma once

#include <cstdint>

#include "common/types.h"

namespace convext::cpu {

// Fused multiply-adds in the type that `dtype` is summed up in, on the vectors of the ISA in use:
// `steps` rounds of them by each of `tasks` tasks side by side. Returns how many floating-point
// operations that were, a multiplication and an addition being two.
int64_t fma_loop(DType dtype, int64_t steps, int64_t tasks);

// Copies `bytes` bytes `repeats` times, each of `tasks` tasks its own part of them.
void copy_loop(const char* from, char* to, int64_t bytes, int64_t repeats, int64_t tasks);

}  // namespace convext::cpu
