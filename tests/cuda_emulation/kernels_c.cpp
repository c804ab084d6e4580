// The CUDA kernels behind a C interface, without torch: what tests/emulated_cuda.py calls.
#include <cstdint>
#include <vector>

#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/moments.h"

using namespace convext;

namespace {

template <class Kernel>
void run_with_workspace(const Kernel& kernel) {
  Arena counter(nullptr);
  kernel(counter);
  // Poisoned: NaN in every format.
  std::vector<unsigned char> workspace(counter.used() + Arena::kAlignment, 0xff);
  Arena arena(Arena::aligned(workspace.data()));
  kernel(arena);
}

Conv2dProblem problem_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3],  sizes[4],  sizes[5],  sizes[6],
          sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], sizes[13]};
}

}  // namespace

extern "C" {

int convext_cuda_algorithm_count() {
  return cuda::conv2d_algorithm_count();
}

const char* convext_cuda_algorithm(int index) {
  return cuda::conv2d_algorithm(index).name;
}

// Runs one pass. `sizes` are Conv2dProblem's members in order; pass, dtype and layout the
// enumerators' values. Returns null, or the reason for which the algorithm declines.
const char* convext_cuda_conv2d(const char* algorithm, int pass, int dtype, int layout,
                                const int64_t* sizes, int tf32, int compute_capability,
                                const void* input, const void* weight, const void* bias,
                                const void* grad_output, void* output) {
  const cuda::Conv2dAlgorithm* chosen = cuda::find_conv2d_algorithm(algorithm);
  if (!chosen) return "no algorithm has this name";
  cuda::Conv2dCall call{};
  call.problem = problem_of(sizes);
  call.pass = Conv2dPass(pass);
  call.dtype = DType(dtype);
  call.layout = Layout(layout);
  call.input = input;
  call.weight = weight;
  call.bias = bias;
  call.grad_output = grad_output;
  call.output = output;
  call.tf32 = tf32;
  call.compute_capability = compute_capability;
  if (const char* reason = chosen->declines(call)) return reason;
  run_with_workspace([&](Arena& arena) { chosen->run(call, arena); });
  return nullptr;
}

// As merge_moments does, in double (1) or float (0).
void convext_cuda_merge_moments(int is_double, const void* partial, int64_t part_rows, int64_t rows,
                                int64_t channels, void* mean, void* deviation) {
  if (is_double) {
    cuda::merge_moments(static_cast<const double*>(partial), part_rows, rows, channels,
                        static_cast<double*>(mean), static_cast<double*>(deviation), nullptr);
  } else {
    cuda::merge_moments(static_cast<const float*>(partial), part_rows, rows, channels,
                        static_cast<float*>(mean), static_cast<float*>(deviation), nullptr);
  }
}

}  // extern "C"
