#include "cpu/kernels/conv_block.h"

#include <algorithm>

#include "cpu/kernels/normalization.h"

namespace convext::cpu {
namespace {

template <class T>
Normalization<T> identity(int64_t channels, Arena& arena) {
  Normalization<T> map(channels, arena);
  if (arena.counting()) return map;
  std::fill_n(map.shift, channels, T(0));
  std::fill_n(map.scale, channels, T(1));
  std::fill_n(map.offset, channels, T(0));
  return map;
}

// Stores the activation, and sums its moments up where they are wanted.
template <class T>
void convolve(const ConvBlockCall& call, bool moments, double* mean, double* deviation,
              Arena& arena) {
  const bool relu = call.norm.relu == Relu::before_norm;
  const Normalization<T> same = identity<T>(call.norm.problem.channels, arena);
  const Conv2dEpilogue epilogue{
      relu,     ColumnMapKind::relu_affine, same.shift, same.scale, same.offset, moments, mean,
      deviation};
  Conv2dCall conv = call.conv;
  conv.epilogue = &epilogue;
  call.algorithm->run(conv, arena);
}

// The convolution's epilogue gathers the statistics, so that a second pass over its output is all
// that normalising takes.
template <class T>
void train(const ConvBlockCall& call, Arena& arena) {
  const int64_t channels = call.norm.problem.channels;
  double* mean = arena.take<double>(channels);
  double* deviation = arena.take<double>(channels);
  convolve<T>(call, true, mean, deviation, arena);
  if (!arena.counting()) {
    const double count = double(std::max<int64_t>(1, call.norm.problem.count()));
    for (int64_t c = 0; c < channels; ++c) {
      static_cast<T*>(call.norm.mean)[c] = T(mean[c]);
      static_cast<T*>(call.norm.var)[c] = T(deviation[c] / count);
    }
  }
  batch_norm_eval(call.norm, arena);
}

// Statistics that are known make batch norm part of the epilogue.
template <class T>
void eval(const ConvBlockCall& call, Arena& arena) {
  if (call.conv.output) {
    convolve<T>(call, false, nullptr, nullptr, arena);
    batch_norm_eval(call.norm, arena);
    return;
  }
  Normalization<T> to(call.norm.problem.channels, arena);
  if (!arena.counting()) {
    const T* mean = static_cast<const T*>(call.norm.mean);
    const T* var = static_cast<const T*>(call.norm.var);
    for (int64_t c = 0; c < call.norm.problem.channels; ++c) {
      to.set(c, mean[c], var[c], call.norm.eps, call.norm.weight, call.norm.bias);
    }
  }
  const bool relu_first = call.norm.relu == Relu::before_norm;
  const Conv2dEpilogue epilogue{
      true,      relu_first ? ColumnMapKind::relu_affine : ColumnMapKind::affine_relu,
      to.shift,  to.scale,
      to.offset, false,
      nullptr,   nullptr};
  Conv2dCall conv = call.conv;
  conv.output = call.norm.output;
  conv.epilogue = &epilogue;
  call.algorithm->run(conv, arena);
}

}  // namespace

void conv_block_train(const ConvBlockCall& call, Arena& arena) {
  call.conv.dtype == DType::float64 ? train<double>(call, arena) : train<float>(call, arena);
}

void conv_block_eval(const ConvBlockCall& call, Arena& arena) {
  call.conv.dtype == DType::float64 ? eval<double>(call, arena) : eval<float>(call, arena);
}

}  // namespace convext::cpu
