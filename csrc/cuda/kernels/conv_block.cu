#include "cuda/kernels/conv_block.h"

#include "cuda/kernels/channel_tally.h"
#include "cuda/kernels/normalization.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 128;

// The norm of each channel as a map, from its statistics.
template <class S>
__global__ void __launch_bounds__(kThreads)
    map_kernel(int64_t channels, const S* __restrict__ mean, const S* __restrict__ var, S eps,
               const S* __restrict__ weight, const S* __restrict__ bias, S* __restrict__ shift,
               S* __restrict__ scale, S* __restrict__ offset) {
  const int64_t c = block_number() * kThreads + threadIdx.x;
  if (c >= channels) return;
  const Normalization<S> map(c, mean[c], 0, var[c], eps, weight, bias);
  shift[c] = map.shift;
  scale[c] = map.scale;
  offset[c] = map.offset;
}

// Where there is an array while it is only counted.
template <class S>
S* place_of(void* array, Arena& arena) {
  static char somewhere;
  return reinterpret_cast<S*>(arena.counting() ? &somewhere : array);
}

// Stores the activation, and its moments where they are wanted.
void convolve(const ConvBlockCall& call, void* mean, void* deviation, Arena& arena) {
  Conv2dCall conv = call.conv;
  conv.epilogue = {};
  conv.epilogue.relu_before = call.norm.relu == Relu::before_norm;
  conv.epilogue.mean = mean;
  conv.epilogue.deviation = deviation;
  call.algorithm->run(conv, arena);
}

// Where the convolution's epilogue gathers the statistics, one pass over its output is all that
// normalising takes.
template <class S>
void train(const ConvBlockCall& call, Arena& arena) {
  if (!call.algorithm->sums_moments) {
    convolve(call, nullptr, nullptr, arena);
    batch_norm_train(call.norm, arena);
    return;
  }
  S* deviation = arena.take<S>(call.norm.problem.channels);
  convolve(call, place_of<S>(call.norm.mean, arena), place_of<S>(deviation, arena), arena);
  batch_norm_by_moments(call.norm, deviation, arena);
}

// Statistics that are known make batch norm part of the epilogue.
template <class S>
void eval(const ConvBlockCall& call, Arena& arena) {
  if (call.conv.output) {
    convolve(call, nullptr, nullptr, arena);
    batch_norm_eval(call.norm, arena);
    return;
  }
  const int64_t channels = call.norm.problem.channels;
  S* shift = arena.take<S>(channels);
  S* scale = arena.take<S>(channels);
  S* offset = arena.take<S>(channels);
  if (!arena.counting()) {
    launch(map_kernel<S>, grid_of(ceil_div(channels, kThreads)), dim3(kThreads), 0,
           call.norm.stream, channels, static_cast<const S*>(call.norm.mean),
           static_cast<const S*>(call.norm.var), S(call.norm.eps),
           static_cast<const S*>(call.norm.weight), static_cast<const S*>(call.norm.bias), shift,
           scale, offset);
  }
  Conv2dCall conv = call.conv;
  conv.output = call.norm.output;
  conv.epilogue = {};
  conv.epilogue.relu_before = call.norm.relu == Relu::before_norm;
  conv.epilogue.shift = place_of<S>(shift, arena);
  conv.epilogue.scale = place_of<S>(scale, arena);
  conv.epilogue.offset = place_of<S>(offset, arena);
  conv.epilogue.relu_after = call.norm.relu == Relu::after_norm;
  call.algorithm->run(conv, arena);
}

}  // namespace

void conv_block_train(const ConvBlockCall& call, Arena& arena) {
  call.conv.dtype == DType::float64 ? train<double>(call, arena) : train<float>(call, arena);
}

void conv_block_eval(const ConvBlockCall& call, Arena& arena) {
  call.conv.dtype == DType::float64 ? eval<double>(call, arena) : eval<float>(call, arena);
}

}  // namespace convext::cuda
