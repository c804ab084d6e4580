// parallel_for on torch's intra-op threads (torch.set_num_threads). at::parallel_for is header
// code: it is serial unless this file is compiled with -fopenmp, which setup.py sees to.
#include "common/parallel.h"

#include <ATen/Parallel.h>

namespace convext {

int64_t num_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  at::parallel_for(0, count, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace convext
