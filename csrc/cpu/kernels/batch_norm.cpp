#include "cpu/kernels/batch_norm.h"

#include <cmath>

#include "cpu/kernels/channel_sweep.h"
#include "cpu/kernels/normalization.h"

namespace convext::cpu {
namespace {

template <class T>
T* array(void* data) {
  return static_cast<T*>(data);
}

template <class T>
ChannelSweep<T> sweep_of(const BatchNormCall& call, Arena& arena) {
  return ChannelSweep<T>(call.problem, call.dtype, call.layout, *call.isa, call.threads, arena);
}

// The forward map of every channel, and where to.
template <class T>
ChannelMap<T> forward_map(ColumnMapKind kind, const Normalization<T>& by,
                          const BatchNormCall& call) {
  return {kind,    call.input, nullptr, by.shift,    by.scale, by.offset,
          nullptr, nullptr,    nullptr, call.output, nullptr};
}

// Moments about a shift near the mean need one pass and lose nothing. A few values give the shift;
// if they mislead, the mean that came out is a good one for a second pass.
template <class T>
void train(const BatchNormCall& call, Arena& arena) {
  const int64_t channels = call.problem.channels;
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  Normalization<T> to(channels, arena);
  double* sum = arena.take<double>(channels);
  double* square = arena.take<double>(channels);
  if (arena.counting()) return;

  T *mean = array<T>(call.mean), *var = array<T>(call.var);
  if (call.problem.count() == 0) {
    for (int64_t c = 0; c < channels; ++c) mean[c] = var[c] = T(0);
    return;
  }
  const double count = double(call.problem.count());
  sweep.sample_means(call.input, to.shift);
  for (int attempt = 0; attempt < 2; ++attempt) {
    sweep.sums({ColumnSum::moments, call.input, nullptr, to.shift, nullptr, nullptr, sum, square});
    bool misled = false;
    for (int64_t c = 0; c < channels; ++c) {
      const double error = sum[c] / count;
      sum[c] = double(to.shift[c]) + error;
      square[c] = square[c] / count - error * error;
      if (square[c] < 0) square[c] = 0;
      if (error * error > square[c]) misled = true;
    }
    if (!misled) break;
    for (int64_t c = 0; attempt == 0 && c < channels; ++c) to.shift[c] = T(sum[c]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = T(sum[c]);
    var[c] = T(square[c]);
    to.set(c, sum[c], square[c], call.eps, call.weight, call.bias);
  }
  sweep.map(forward_map(ColumnMapKind::affine, to, call));
}

template <class T>
void set_given(const BatchNormCall& call, Normalization<T>& to) {
  const T *mean = array<T>(call.mean), *var = array<T>(call.var);
  for (int64_t c = 0; c < call.problem.channels; ++c) {
    to.set(c, double(mean[c]), double(var[c]), call.eps, call.weight, call.bias);
  }
}

template <class T>
void eval(const BatchNormCall& call, Arena& arena) {
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  Normalization<T> to(call.problem.channels, arena);
  if (arena.counting()) return;
  set_given(call, to);
  const bool relu = call.relu == Relu::after_norm;
  sweep.map(forward_map(relu ? ColumnMapKind::affine_relu : ColumnMapKind::affine, to, call));
}

ColumnMapKind gradient_kind(const BatchNormCall& call) {
  using K = ColumnMapKind;
  switch (call.relu) {
    case Relu::before_norm:
      return call.training ? K::relu_affine_gradient : K::relu_affine_eval_gradient;
    case Relu::after_norm:
      return call.training ? K::affine_relu_gradient : K::affine_relu_eval_gradient;
    default:
      return K::gradient;
  }
}

// With g = grad_output (zero where a ReLU after the norm stopped the forward pass), r = 1 /
// sqrt(var + eps), d = x - mean and means over the batch,
//
//   grad_bias = sum(g),  grad_weight = sum(g * d) * r
//   grad_input = weight * r * (g - mean(g) - d * r^2 * mean(g * d))    in training
//   grad_input = weight * r * g                                        with given statistics
//
// and then zero where a ReLU before the norm stopped the forward pass.
template <class T>
void backward(const BatchNormCall& call, Arena& arena) {
  const int64_t channels = call.problem.channels;
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  Normalization<T> linear(channels, arena);  // the part of grad_input that is linear in x
  T* grad_scale = arena.take<T>(channels);
  const bool gated = call.relu == Relu::after_norm;
  Normalization<T> gate(gated ? channels : 0, arena);  // the forward map
  double* sum = arena.take<double>(channels);
  double* dot = arena.take<double>(channels);
  if (arena.counting()) return;

  const T *mean = array<T>(call.mean), *var = array<T>(call.var);
  T *grad_weight = array<T>(call.grad_weight), *grad_bias = array<T>(call.grad_bias);
  const double count = double(call.problem.count());
  if (gated) set_given(call, gate);
  sweep.sums({gated ? ColumnSum::gated_product : ColumnSum::product, call.grad_output, call.input,
              mean, gated ? gate.scale : nullptr, gated ? gate.offset : nullptr, sum, dot});
  for (int64_t c = 0; c < channels; ++c) {
    const double r = 1 / std::sqrt(double(var[c]) + call.eps);
    const double scale = value_or<T>(call.weight, c, 1) * r;
    // Nothing to sum is a sum of zero, whatever the statistics.
    grad_weight[c] = T(count == 0 ? 0 : dot[c] * r);
    grad_bias[c] = T(sum[c]);
    const bool plain_eval = !call.training && call.relu == Relu::none;
    linear.shift[c] = plain_eval ? T(0) : mean[c];
    grad_scale[c] = T(scale);
    linear.scale[c] = call.training ? T(-scale * r * r * dot[c] / count) : T(scale);
    linear.offset[c] = call.training ? T(-scale * sum[c] / count) : T(0);
  }
  double* result_sum = call.grad_input_sum ? sum : nullptr;
  if (!call.training && call.relu == Relu::none) {  // the gradient is what is mapped
    sweep.map({ColumnMapKind::affine, call.grad_output, nullptr, linear.shift, linear.scale,
               linear.offset, nullptr, nullptr, nullptr, call.output, result_sum});
  } else {
    sweep.map({gradient_kind(call), call.input, call.grad_output, linear.shift, linear.scale,
               linear.offset, grad_scale, gated ? gate.scale : nullptr,
               gated ? gate.offset : nullptr, call.output, result_sum});
  }
  for (int64_t c = 0; result_sum && c < channels; ++c) {
    array<T>(call.grad_input_sum)[c] = T(sum[c]);
  }
}

template <class T>
void sum_channels(const BatchNormCall& call, Arena& arena) {
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  double* sum = arena.take<double>(call.problem.channels);
  if (arena.counting()) return;
  sweep.sums(
      {ColumnSum::total, call.grad_output, nullptr, nullptr, nullptr, nullptr, sum, nullptr});
  for (int64_t c = 0; c < call.problem.channels; ++c) array<T>(call.grad_bias)[c] = T(sum[c]);
}

}  // namespace

void batch_norm_train(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? train<double>(call, arena) : train<float>(call, arena);
}

void batch_norm_eval(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? eval<double>(call, arena) : eval<float>(call, arena);
}

void batch_norm_backward(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? backward<double>(call, arena) : backward<float>(call, arena);
}

void channel_sum(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? sum_channels<double>(call, arena)
                               : sum_channels<float>(call, arena);
}

}  // namespace convext::cpu
