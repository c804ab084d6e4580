// The CUDA kernels behind a C interface, without torch: what tests/emulated_cuda.py calls.
#include <cstdint>
#include <vector>

#include "common/conv_block_problem.h"
#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/conv2d_choice.h"
#include "cuda/kernels/conv_block.h"
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

// "direct", and then what a kernel's epilogue might have found: the moments of float or double
// results. A device's memory is the host's here.
template <class T>
void direct_with_moments(const cuda::Conv2dCall& call, Arena& arena) {
  cuda::conv2d_direct(call, arena);
  if (arena.counting() || !call.epilogue.mean) return;
  const Conv2dProblem& p = call.problem;
  const int64_t pixels = p.out_height() * p.out_width(), channels = p.out_channels;
  const bool nhwc = call.layout == Layout::nhwc;
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [&](int64_t i) {
      const int64_t place =
          nhwc ? i * channels + c : (i / pixels * channels + c) * pixels + i % pixels;
      return double(static_cast<const T*>(call.output)[place]);
    };
    double mean = 0, deviation = 0;
    for (int64_t i = 0; i < p.out_pixels(); ++i) mean += at(i) / double(p.out_pixels());
    for (int64_t i = 0; i < p.out_pixels(); ++i) deviation += (at(i) - mean) * (at(i) - mean);
    static_cast<T*>(call.epilogue.mean)[c] = T(mean);
    static_cast<T*>(call.epilogue.deviation)[c] = T(deviation);
  }
}

const cuda::Conv2dAlgorithm kWithMoments{"direct with moments", nullptr,
                                         [](const cuda::Conv2dCall& call, Arena& arena) {
                                           call.dtype == DType::float64
                                               ? direct_with_moments<double>(call, arena)
                                               : direct_with_moments<float>(call, arena);
                                         },
                                         true};

// Without operands. `sizes` are Conv2dProblem's members in order; pass, dtype and layout the
// enumerators' values.
cuda::Conv2dCall call_of(int pass, int dtype, int layout, const int64_t* sizes, int tf32,
                         int compute_capability) {
  cuda::Conv2dCall call{};
  call.problem = problem_of(sizes);
  call.pass = Conv2dPass(pass);
  call.dtype = DType(dtype);
  call.layout = Layout(layout);
  call.tf32 = tf32;
  call.compute_capability = compute_capability;
  return call;
}

}  // namespace

extern "C" {

int convext_cuda_algorithm_count() {
  return cuda::conv2d_algorithm_count();
}

const char* convext_cuda_algorithm(int index) {
  return cuda::conv2d_algorithm(index).name;
}

// Runs one pass. `map` is the epilogue's shift, scale and offset. Returns null, or the reason for
// which the algorithm declines.
const char* convext_cuda_conv2d(const char* algorithm, int pass, int dtype, int layout,
                                const int64_t* sizes, int tf32, int compute_capability,
                                const void* input, const void* weight, const void* bias,
                                const void* grad_output, void* output, int relu_before,
                                const void* const* map, int relu_after) {
  const cuda::Conv2dAlgorithm* chosen = cuda::find_conv2d_algorithm(algorithm);
  if (!chosen) return "no algorithm has this name";
  cuda::Conv2dCall call = call_of(pass, dtype, layout, sizes, tf32, compute_capability);
  call.input = input;
  call.weight = weight;
  call.bias = bias;
  call.grad_output = grad_output;
  call.output = output;
  call.epilogue.relu_before = relu_before;
  call.epilogue.shift = map[0];
  call.epilogue.scale = map[1];
  call.epilogue.offset = map[2];
  call.epilogue.relu_after = relu_after;
  if (const char* reason = chosen->declines(call)) return reason;
  run_with_workspace([&](Arena& arena) { chosen->run(call, arena); });
  return nullptr;
}

// Runs train (0), eval (1), backward after either (2, 3), or the sum of a bias's gradient (4).
// `arrays` are the pointers of BatchNormCall from input to grad_input_sum, in order.
void convext_cuda_batch_norm(int what, int relu, int dtype, int layout, double eps,
                             const int64_t* sizes, void* const* arrays) {
  cuda::BatchNormCall call{};
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
  call.eps = eps;
  call.training = what == 2;
  constexpr void (*kKernels[])(const cuda::BatchNormCall&, Arena&) = {
      cuda::batch_norm_train, cuda::batch_norm_eval, cuda::batch_norm_backward,
      cuda::batch_norm_backward, cuda::channel_sum};
  run_with_workspace([&](Arena& arena) { kKernels[what](call, arena); });
}

// Runs a block in training or evaluation. `arrays` are input, weight, bias; norm's weight, bias,
// mean and var; activation, which evaluation may do without, and output. The algorithm "direct with
// moments" is for float and double.
void convext_cuda_conv_block(const char* algorithm, int training, int relu, int dtype, int layout,
                             double eps, const int64_t* sizes, void* const* arrays) {
  const ConvBlockProblem problem{problem_of(sizes), Relu(relu)};
  cuda::ConvBlockCall call{};
  call.algorithm = algorithm == std::string_view(kWithMoments.name)
                       ? &kWithMoments
                       : cuda::find_conv2d_algorithm(algorithm);
  call.conv.problem = problem.conv;
  call.conv.pass = Conv2dPass::forward;
  call.conv.input = arrays[0];
  call.conv.weight = arrays[1];
  call.conv.bias = arrays[2];
  call.conv.output = arrays[7];
  call.conv.compute_capability = 90;
  call.norm.problem = problem.norm();
  call.norm.relu = problem.relu;
  call.norm.input = arrays[7];
  call.norm.weight = arrays[3];
  call.norm.bias = arrays[4];
  call.norm.mean = arrays[5];
  call.norm.var = arrays[6];
  call.norm.output = arrays[8];
  call.norm.eps = eps;
  call.conv.dtype = call.norm.dtype = DType(dtype);
  call.conv.layout = call.norm.layout = Layout(layout);
  run_with_workspace([&](Arena& arena) {
    training ? cuda::conv_block_train(call, arena) : cuda::conv_block_eval(call, arena);
  });
}

// What "auto" takes.
const char* convext_cuda_auto(int pass, int dtype, int layout, const int64_t* sizes, int tf32,
                              int compute_capability, const char** reason) {
  const cuda::Conv2dChoice choice = cuda::choose_conv2d_algorithm(
      call_of(pass, dtype, layout, sizes, tf32, compute_capability), false);
  *reason = choice.reason;
  return choice.algorithm->name;
}

// A row of its table; null past the last.
const char* convext_cuda_auto_row(int index, const char** reason) {
  if (index >= cuda::conv2d_choice_count()) return nullptr;
  const cuda::Conv2dChoiceRow& row = cuda::conv2d_choice(index);
  *reason = row.reason;
  return row.algorithm.data();  // of a literal
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
