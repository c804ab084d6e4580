// The CPU kernels behind a C interface, without torch: what tests/test_avx512_emulated.py calls.
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/kernels/conv2d.h"

namespace convext {

int64_t num_threads() {
  return 1;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace convext

using namespace convext;

// Runs one pass with the named ISA and algorithm; `sizes` are Conv2dProblem's members in order, the
// enumerators of pass, dtype and layout by value. Returns 0, or 1 for a name that is not there.
extern "C" int convext_conv2d(const char* isa, const char* algorithm, int pass, int dtype,
                              int layout, const int64_t* sizes, const void* input,
                              const void* weight, const void* bias, const void* grad_output,
                              void* output) {
  const cpu::Conv2dAlgorithm* chosen = cpu::find_conv2d_algorithm(algorithm);
  if (!chosen || !cpu::set_isa(isa)) return 1;
  const Conv2dProblem problem{sizes[0],  sizes[1],  sizes[2],  sizes[3], sizes[4],
                              sizes[5],  sizes[6],  sizes[7],  sizes[8], sizes[9],
                              sizes[10], sizes[11], sizes[12], sizes[13]};
  const cpu::Conv2dCall call{problem, Conv2dPass(pass), DType(dtype), Layout(layout),
                             input,   weight,           bias,         grad_output,
                             output,  &cpu::kernels(),  /*threads=*/3};
  cpu::Arena counter(nullptr);
  chosen->run(call, counter);
  std::vector<char> workspace(counter.used() + cpu::Arena::kAlignment);
  const auto address = int64_t(reinterpret_cast<uintptr_t>(workspace.data()));
  cpu::Arena arena(reinterpret_cast<void*>(round_up(address, cpu::Arena::kAlignment)));
  chosen->run(call, arena);
  return 0;
}
