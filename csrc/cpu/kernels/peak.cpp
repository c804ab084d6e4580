#include "cpu/kernels/peak.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {
namespace {

template <class T>
int64_t run_fma_loop(int64_t steps, int64_t tasks) {
  std::atomic<int64_t> operations{0};
  parallel_for(tasks, [&](int64_t) {
    T sums[64];  // more than any vector has lanes; written so that the loop has a result
    operations += kernels().of<T>().fma_loop(steps, sums);
  });
  return operations;
}

}  // namespace

int64_t fma_loop(DType dtype, int64_t steps, int64_t tasks) {
  return dtype == DType::float64 ? run_fma_loop<double>(steps, tasks)
                                 : run_fma_loop<float>(steps, tasks);
}

void copy_loop(const char* from, char* to, int64_t bytes, int64_t repeats, int64_t tasks) {
  const int64_t part = ceil_div(bytes, tasks);
  parallel_for(tasks, [&](int64_t task) {
    const int64_t begin = std::min(bytes, task * part);
    const int64_t end = std::min(bytes, begin + part);
    for (int64_t i = 0; i < repeats; ++i) std::memcpy(to + begin, from + begin, end - begin);
  });
}

}  // namespace convext::cpu
