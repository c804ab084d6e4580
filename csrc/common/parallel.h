// The only door from the kernels to threads. The host implements it (csrc/cpu/parallel.cpp does, on
// torch's pool), so that kernels need no torch header.
#pragma once

#include <cstdint>
#include <functional>

namespace convext {

// Threads that parallel_for may use; at least 1.
int64_t num_threads();

// Calls body(i) once for every i in [0, count), on any threads, in any order. Callers cut the work
// by its shape, never by num_threads(), wherever the cut could change a result's bits.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace convext
