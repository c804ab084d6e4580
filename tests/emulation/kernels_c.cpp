// The CPU kernels behind a C interface, without torch: what tests/test_avx512_emulated.py calls.
#include <cstdint>
#include <vector>

#include "common/conv_block_problem.h"
#include "common/parallel.h"
#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv_block.h"

namespace convext {

int64_t num_threads() {
  return 1;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace convext

using namespace convext;

namespace {

template <class Kernel>
void run_with_workspace(const Kernel& kernel) {
  Arena counter(nullptr);
  kernel(counter);
  std::vector<char> workspace(counter.used() + Arena::kAlignment);
  Arena arena(Arena::aligned(workspace.data()));
  kernel(arena);
}

Conv2dProblem problem_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3],  sizes[4],  sizes[5],  sizes[6],
          sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], sizes[13]};
}

}  // namespace

// Runs one pass with the named ISA and algorithm; `sizes` are Conv2dProblem's members in order, the
// enumerators of pass, dtype and layout by value. Returns 0, or 1 for a name that is not there.
extern "C" int convext_conv2d(const char* isa, const char* algorithm, int pass, int dtype,
                              int layout, const int64_t* sizes, const void* input,
                              const void* weight, const void* bias, const void* grad_output,
                              void* output) {
  const cpu::Conv2dAlgorithm* chosen = cpu::find_conv2d_algorithm(algorithm);
  if (!chosen || !cpu::set_isa(isa)) return 1;
  cpu::Conv2dCall call{};
  call.problem = problem_of(sizes);
  call.pass = Conv2dPass(pass);
  call.dtype = DType(dtype);
  call.layout = Layout(layout);
  call.input = input;
  call.weight = weight;
  call.bias = bias;
  call.grad_output = grad_output;
  call.output = output;
  call.isa = &cpu::kernels();
  call.threads = 3;
  run_with_workspace([&](Arena& arena) { chosen->run(call, arena); });
  return 0;
}

// Runs train (0), eval (1), backward after either (2, 3), or the sum of a bias's gradient (4).
// `arrays` are the pointers of BatchNormCall from input to grad_input_sum, in order.
extern "C" int convext_batch_norm(const char* isa, int what, int relu, int dtype, int layout,
                                  const int64_t* sizes, void* const* arrays) {
  if (!cpu::set_isa(isa)) return 1;
  cpu::BatchNormCall call{};
  call.problem = {sizes[0], sizes[1], sizes[2]};
  call.dtype = DType(dtype);
  call.layout = Layout(layout);
  call.input = arrays[0];
  call.grad_output = arrays[1];
  call.weight = arrays[2];
  call.bias = arrays[3];
  call.mean = arrays[4];
  call.var = arrays[5];
  call.output = arrays[6];
  call.grad_weight = arrays[7];
  call.grad_bias = arrays[8];
  call.grad_input_sum = arrays[9];
  call.relu = Relu(relu);
  call.eps = 1e-5;
  call.training = what == 2;
  call.isa = &cpu::kernels();
  call.threads = 3;
  constexpr void (*kKernels[])(const cpu::BatchNormCall&, Arena&) = {
      cpu::batch_norm_train, cpu::batch_norm_eval, cpu::batch_norm_backward,
      cpu::batch_norm_backward, cpu::channel_sum};
  run_with_workspace([&](Arena& arena) { kKernels[what](call, arena); });
  return 0;
}

// Runs a block in training or evaluation. `arrays` are input, weight, bias; norm's weight, bias,
// mean and var; activation, which evaluation may do without, and output.
extern "C" int convext_conv_block(const char* isa, int training, int relu, int dtype, int layout,
                                  const int64_t* sizes, void* const* arrays) {
  if (!cpu::set_isa(isa)) return 1;
  const ConvBlockProblem problem{problem_of(sizes), Relu(relu)};
  cpu::ConvBlockCall call{};
  call.algorithm = cpu::find_conv2d_algorithm("direct");
  call.conv.problem = problem.conv;
  call.conv.pass = Conv2dPass::forward;
  call.conv.input = arrays[0];
  call.conv.weight = arrays[1];
  call.conv.bias = arrays[2];
  call.conv.output = arrays[7];
  call.norm.problem = problem.norm();
  call.norm.relu = problem.relu;
  call.norm.input = arrays[7];
  call.norm.weight = arrays[3];
  call.norm.bias = arrays[4];
  call.norm.mean = arrays[5];
  call.norm.var = arrays[6];
  call.norm.output = arrays[8];
  call.norm.eps = 1e-5;
  call.conv.dtype = call.norm.dtype = DType(dtype);
  call.conv.layout = call.norm.layout = Layout(layout);
  call.conv.isa = call.norm.isa = &cpu::kernels();
  call.conv.threads = call.norm.threads = 3;
  run_with_workspace([&](Arena& arena) {
    training ? cpu::conv_block_train(call, arena) : cpu::conv_block_eval(call, arena);
  });
  return 0;
}
