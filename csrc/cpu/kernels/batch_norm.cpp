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
ChannelSweep<T> sweep_of(const BatchNormCall& call, int64_t tensors, Arena& arena) {
  return ChannelSweep<T>(call.problem, call.dtype, call.layout, tensors, *call.isa, call.threads,
                         arena);
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
  const ChannelSweep<T> sweep = sweep_of<T>(call, 1, arena);
  Normalization<T> to(channels, arena);
  double* sum = arena.take<double>(channels);
  double* square = arena.take<double>(channels);
  if (arena.counting()) return;

  T *mean = array<T>(call.mean), *var = array<T>(call.var);
  if (call.problem.count() == 0) {
    for (int64_t c = 0; c < channels; ++c) mean[c] = var[c] = T(0);
    return;
  }
  const double per_value = 1 / double(call.problem.count());
  sweep.for_blocks([&](const auto& block) {
    const int64_t first = block.first_channel(), end = block.end_channel();
    block.sample_means(call.input, to.shift);
    for (int attempt = 0; attempt < 2; ++attempt) {
      block.sums(
          {ColumnSum::moments, call.input, nullptr, to.shift, nullptr, nullptr, sum, square});
      bool misled = false;
      for (int64_t c = first; c < end; ++c) {
        const double error = sum[c] * per_value;
        sum[c] = double(to.shift[c]) + error;
        square[c] = square[c] * per_value - error * error;
        if (square[c] < 0) square[c] = 0;
        if (error * error > square[c]) misled = true;
      }
      if (!misled) break;
      for (int64_t c = first; attempt == 0 && c < end; ++c) to.shift[c] = T(sum[c]);
    }
    for (int64_t c = first; c < end; ++c) {
      mean[c] = T(sum[c]);
      var[c] = T(square[c]);
      to.set(c, sum[c], square[c], call.eps, call.weight, call.bias);
    }
    block.map(forward_map(ColumnMapKind::affine, to, call));
  });
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
  const ChannelSweep<T> sweep = sweep_of<T>(call, 0, arena);
  Normalization<T> to(call.problem.channels, arena);
  if (arena.counting()) return;
  set_given(call, to);
  const bool relu = call.relu == Relu::after_norm;
  sweep.for_blocks([&](const auto& block) {
    block.map(forward_map(relu ? ColumnMapKind::affine_relu : ColumnMapKind::affine, to, call));
  });
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
  const ChannelSweep<T> sweep = sweep_of<T>(call, 2, arena);
  const Normalization<T> linear(channels, arena);  // the part of grad_input that is linear in x
  T* grad_scale = arena.take<T>(channels);
  const bool gated = call.relu == Relu::after_norm;
  Normalization<T> gate(gated ? channels : 0, arena);  // the forward map
  double* sum = arena.take<double>(channels);
  double* dot = arena.take<double>(channels);
  if (arena.counting()) return;

  const T *mean = array<T>(call.mean), *var = array<T>(call.var);
  T *grad_weight = array<T>(call.grad_weight), *grad_bias = array<T>(call.grad_bias);
  T* grad_input_sum = array<T>(call.grad_input_sum);
  const double count = double(call.problem.count());
  if (gated) set_given(call, gate);
  const bool plain_eval = !call.training && call.relu == Relu::none;
  const ChannelSums<T> sums{gated ? ColumnSum::gated_product : ColumnSum::product,
                            call.grad_output,
                            call.input,
                            mean,
                            gated ? gate.scale : nullptr,
                            gated ? gate.offset : nullptr,
                            sum,
                            dot};
  ChannelMap<T> map{gradient_kind(call),
                    call.input,
                    call.grad_output,
                    linear.shift,
                    linear.scale,
                    linear.offset,
                    grad_scale,
                    gated ? gate.scale : nullptr,
                    gated ? gate.offset : nullptr,
                    call.output,
                    grad_input_sum ? sum : nullptr};
  if (plain_eval) {  // the gradient is what is mapped
    map.kind = ColumnMapKind::affine;
    map.x = call.grad_output;
    map.grad = nullptr;
  }
  const auto solve = [&](int64_t c) {
    const double r = 1 / std::sqrt(double(var[c]) + call.eps);
    const double scale = value_or<T>(call.weight, c, 1) * r;
    // Nothing to sum is a sum of zero, whatever the statistics.
    grad_weight[c] = T(count == 0 ? 0 : dot[c] * r);
    grad_bias[c] = T(sum[c]);
    linear.shift[c] = plain_eval ? T(0) : mean[c];
    grad_scale[c] = T(scale);
    linear.scale[c] = call.training ? T(-scale * r * r * dot[c] / count) : T(scale);
    linear.offset[c] = call.training ? T(-scale * sum[c] / count) : T(0);
  };
  sweep.for_blocks([&](const auto& block) {
    const int64_t first = block.first_channel(), end = block.end_channel();
    block.sums(sums);
    for (int64_t c = first; c < end; ++c) solve(c);
    block.map(map);
    for (int64_t c = first; grad_input_sum && c < end; ++c) grad_input_sum[c] = T(sum[c]);
  });
}

template <class T>
void sum_channels(const BatchNormCall& call, Arena& arena) {
  const ChannelSweep<T> sweep = sweep_of<T>(call, 0, arena);
  double* sum = arena.take<double>(call.problem.channels);
  if (arena.counting()) return;
  sweep.for_blocks([&](const auto& block) {
    block.sums(
        {ColumnSum::total, call.grad_output, nullptr, nullptr, nullptr, nullptr, sum, nullptr});
  });
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
