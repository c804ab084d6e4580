#include "cpu/kernels/batch_norm.h"

#include <cmath>

#include "cpu/kernels/channel_sweep.h"

namespace convext::cpu {
namespace {

template <class T>
T* array(void* data) {
  return static_cast<T*>(data);
}

template <class T>
double value_or(const void* data, int64_t i, double absent) {
  return data ? double(static_cast<const T*>(data)[i]) : absent;
}

template <class T>
ChannelSweep<T> sweep_of(const BatchNormCall& call, Arena& arena) {
  return ChannelSweep<T>(call.problem, call.dtype, call.layout, *call.isa, call.threads, arena);
}

// Coefficients of y = (x - shift) * scale + offset [+ grad * grad_scale], one for each channel.
template <class T>
struct Coefficients {
  Coefficients(int64_t channels, Arena& arena)
      : shift(arena.take<T>(channels)),
        scale(arena.take<T>(channels)),
        offset(arena.take<T>(channels)),
        grad_scale(arena.take<T>(channels)) {}
  T *shift, *scale, *offset, *grad_scale;
};

// The normalisation by a mean known in double. Subtracting the mean first keeps what digits x has
// when the mean is large; what rounding the mean to T leaves over goes into the offset.
template <class T>
void set_normalization(const BatchNormCall& call, const Coefficients<T>& to, int64_t c, double mean,
                       double var) {
  const double scale = value_or<T>(call.weight, c, 1) / std::sqrt(var + call.eps);
  to.shift[c] = T(mean);
  to.scale[c] = T(scale);
  to.offset[c] = T(value_or<T>(call.bias, c, 0) - (mean - double(T(mean))) * scale);
}

// Moments about a shift near the mean need one pass and lose nothing. A few values give the shift;
// if they mislead, the mean that came out is a good one for a second pass.
template <class T>
void train(const BatchNormCall& call, Arena& arena) {
  const int64_t channels = call.problem.channels;
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  const Coefficients<T> to(channels, arena);
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
    sweep.sums(ColumnSum::moments, call.input, nullptr, to.shift, sum, square);
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
    set_normalization(call, to, c, sum[c], square[c]);
  }
  sweep.map(call.input, nullptr, to.shift, to.scale, to.offset, nullptr, call.output);
}

template <class T>
void eval(const BatchNormCall& call, Arena& arena) {
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  const Coefficients<T> to(call.problem.channels, arena);
  if (arena.counting()) return;
  const T *mean = array<T>(call.mean), *var = array<T>(call.var);
  for (int64_t c = 0; c < call.problem.channels; ++c) {
    set_normalization(call, to, c, double(mean[c]), double(var[c]));
  }
  sweep.map(call.input, nullptr, to.shift, to.scale, to.offset, nullptr, call.output);
}

// With g = grad_output, r = 1 / sqrt(var + eps), d = x - mean and means over the batch,
//
//   grad_bias = sum(g),  grad_weight = sum(g * d) * r
//   grad_input = weight * r * (g - mean(g) - d * r^2 * mean(g * d))    in training
//   grad_input = weight * r * g                                        with given statistics
template <class T>
void backward(const BatchNormCall& call, Arena& arena) {
  const int64_t channels = call.problem.channels;
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  const Coefficients<T> to(channels, arena);
  double* sum = arena.take<double>(channels);
  double* dot = arena.take<double>(channels);
  if (arena.counting()) return;

  const T *mean = array<T>(call.mean), *var = array<T>(call.var);
  T *grad_weight = array<T>(call.grad_weight), *grad_bias = array<T>(call.grad_bias);
  const double count = double(call.problem.count());
  sweep.sums(ColumnSum::product, call.grad_output, call.input, mean, sum, dot);
  for (int64_t c = 0; c < channels; ++c) {
    const double r = 1 / std::sqrt(double(var[c]) + call.eps);
    const double scale = value_or<T>(call.weight, c, 1) * r;
    // Nothing to sum is a sum of zero, whatever the statistics.
    grad_weight[c] = T(count == 0 ? 0 : dot[c] * r);
    grad_bias[c] = T(sum[c]);
    to.shift[c] = call.training ? mean[c] : T(0);
    to.grad_scale[c] = T(scale);
    to.scale[c] = call.training ? T(-scale * r * r * dot[c] / count) : T(scale);
    to.offset[c] = call.training ? T(-scale * sum[c] / count) : T(0);
  }
  if (call.training) {
    sweep.map(call.input, call.grad_output, to.shift, to.scale, to.offset, to.grad_scale,
              call.output);
  } else {
    sweep.map(call.grad_output, nullptr, to.shift, to.scale, to.offset, nullptr, call.output);
  }
}

template <class T>
void sum_channels(const BatchNormCall& call, Arena& arena) {
  ChannelSweep<T> sweep = sweep_of<T>(call, arena);
  double* sum = arena.take<double>(call.problem.channels);
  if (arena.counting()) return;
  sweep.sums(ColumnSum::total, call.grad_output, nullptr, nullptr, sum, nullptr);
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
