// Batch norm's backward pass, and the sums of a channel that are the gradient of a bias.
//
// With g = grad_output (zero where a ReLU after the norm stopped the forward pass), r = 1 /
// sqrt(var + eps), d = x - mean and means over the batch,
//
//   grad_bias = sum(g),  grad_weight = sum(g * d) * r
//   grad_input = weight * r * (g - mean(g) - d * r^2 * mean(g * d))    in training
//   grad_input = weight * r * g                                        with given statistics
//
// and then zero where a ReLU before the norm stopped the forward pass.
#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/channel_items.h"
#include "cuda/kernels/channel_tally.h"
#include "cuda/kernels/moments.h"
#include "cuda/kernels/normalization.h"

namespace convext::cuda {
namespace {

enum class Step {
  all,        // sum a channel up in one block, and use the sums
  gather,     // the parts' sums, to `partial`
  from_parts  // add them up, and use them
};

template <class T>
struct Backward {
  using S = Sum<T>;
  Step step;
  bool maps;  // or is only the sum of grad_output wanted, and the rest null?
  bool aligned, training;
  Relu relu;
  const T *grad_output, *input;
  T* grad_input;
  S* partial;  // [part][sum, dot][channel]
  const S *mean, *var, *weight, *bias;
  S eps;
  S *grad_weight, *grad_bias;
  S* grad_input_sum;  // [part][channel], or null
};

template <class T, int V, bool kByRow>
__global__ void __launch_bounds__(512, 1) backward_kernel(ChannelGrid grid, Backward<T> call) {
  using S = Sum<T>;
  constexpr int K = kThreadChannels<kByRow, V>;
  constexpr int kAtOnce = V == 1 ? 4 : 2;
  using Tally = Sums<S, 2 * K>;  // K sums of g, then K of g * d
  const ChannelPlace place = ChannelPlace::of<kByRow, V>(grid);
  if (place.part >= grid.parts) return;
  const Coefficients<S, K> shared{dynamic_shared<S>() + blockDim.x * kTallyValues<Tally>,
                                  grid.columns};
  const bool gated = call.relu == Relu::after_norm;

  // The forward map: what it is zero for was stopped.
  S shift[K] = {}, gate_scale[K] = {}, gate_offset[K] = {};
  if (call.maps) {
    if (place.row == 0 && place.inside) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t c = place.channel + k;
        const Normalization<S> forward(c, call.mean[c], 0, call.var[c], call.eps, call.weight,
                                       call.bias);
        shared.at(0, k) = forward.shift;
        shared.at(1, k) = forward.scale;
        shared.at(2, k) = forward.offset;
      }
    }
    __syncthreads();
    shared.read(0, shift);
    shared.read(1, gate_scale);
    shared.read(2, gate_offset);
  }
  // g and x - mean of items.
  const auto read = [&](const int64_t (&at)[kAtOnce], int n, S(&g)[kAtOnce][V], S(&x)[kAtOnce][V]) {
    read_items<T, V>(g, call.grad_output, at, n, call.aligned);
    if (!call.maps) return;
    read_items<T, V>(x, call.input, at, n, call.aligned);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const S d = x[u][v] - shift[v % K];
        const bool stopped = gated && multiply_add(d, gate_scale[v % K], gate_offset[v % K]) <= 0;
        g[u][v] = stopped ? S(0) : g[u][v];
      }
    }
  };

  Tally tally{};
  if (call.step != Step::from_parts) {
    for_items<kByRow, kAtOnce>(grid, place, [&](const int64_t (&at)[kAtOnce], int n) {
      S g[kAtOnce][V], x[kAtOnce][V] = {};
      read(at, n, g, x);
      Tally some{};  // what is not there is zero
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const S d = x[u][v] - shift[v % K];
          some.sum[v % K] += g[u][v];
          some.sum[K + v % K] = multiply_add(g[u][v], d, some.sum[K + v % K]);
        }
      }
      tally.merge(some);
    });
  } else if (place.inside) {
    for (int64_t part = place.row; part < grid.parts; part += blockDim.x / grid.columns) {
      const S* from = call.partial + part * 2 * grid.channels + place.channel;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        tally.sum[k] += from[k];
        tally.sum[K + k] += from[grid.channels + k];
      }
    }
  }
  tally = merge_rows(tally, grid.columns, dynamic_shared<S>());

  const bool speaks = place.row == 0 && place.inside;  // for its channels
  if (call.step == Step::gather) {
    if (!speaks) return;
    S* to = call.partial + place.part * 2 * grid.channels + place.channel;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = tally.sum[k];
      to[grid.channels + k] = tally.sum[K + k];
    }
    return;
  }

  if (speaks) {
    const S per_value = 1 / S(grid.count > 0 ? grid.count : 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = place.channel + k;
      const S sum = tally.sum[k], dot = tally.sum[K + k];
      if (place.part == 0) call.grad_bias[c] = sum;
      if (!call.maps) continue;
      const S r = 1 / square_root(call.var[c] + call.eps), scale = gate_scale[k];
      // Nothing to sum is a sum of zero, whatever the statistics.
      if (place.part == 0) call.grad_weight[c] = grid.count > 0 ? dot * r : S(0);
      shared.at(3, k) = -scale * r * (r * (dot * per_value));
      shared.at(4, k) = -scale * (sum * per_value);
    }
  }
  if (!call.maps) return;
  __syncthreads();
  S linear[K], offset[K];
  shared.read(3, linear);
  shared.read(4, offset);
  Sums<S, K> results{};
  for_items<kByRow, kAtOnce>(grid, place, [&](const int64_t (&at)[kAtOnce], int n) {
    S g[kAtOnce][V], x[kAtOnce][V];
    read(at, n, g, x);
    Sums<S, K> some{};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        constexpr S kZero = 0;
        const S d = x[u][v] - shift[v % K];
        S y = g[u][v] * gate_scale[v % K];
        if (call.training) {
          y = multiply_add(g[u][v], gate_scale[v % K],
                           multiply_add(d, linear[v % K], offset[v % K]));
        }
        if (call.relu == Relu::before_norm && x[u][v] <= 0) y = kZero;
        g[u][v] = y;
        some.sum[v % K] += u < n ? y : kZero;
      }
    }
    results.merge(some);
    write_items<T, V>(call.grad_input, at, n, call.aligned, g);
  });
  if (!call.grad_input_sum) return;
  results = merge_rows(results, grid.columns, dynamic_shared<S>());
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!speaks) break;
    call.grad_input_sum[place.part * grid.channels + place.channel + k] = results.sum[k];
  }
}

template <class S>
S* array(void* data) {
  return static_cast<S*>(data);
}

template <class S>
void backward(const BatchNormCall& call, bool maps, Arena& arena) {
  const ChannelGrid grid(call.problem, call.dtype, call.layout, true);
  const int64_t partials = grid.parts > 1 ? grid.parts * grid.channels : 0;
  S* partial = arena.take<S>(2 * partials);
  S* result_sums = arena.take<S>(maps ? partials : 0);
  if (arena.counting() || grid.channels == 0) return;
  const bool sums_results = maps && call.grad_input_sum;
  with_items_of(call.dtype, grid, [&](auto element, auto vector, auto by_row) {
    using T = decltype(element);
    constexpr int V = decltype(vector)::value;
    constexpr bool kByRow = decltype(by_row)::value;
    constexpr int K = kThreadChannels<kByRow, V>;
    if constexpr (std::is_same_v<S, Sum<T>>) {
      Backward<T> backward{};
      backward.maps = maps;
      backward.aligned = lie_aligned<T, V>(call.grad_output, call.input, call.output);
      backward.training = call.training;
      backward.relu = call.relu;
      backward.grad_output = static_cast<const T*>(call.grad_output);
      backward.input = static_cast<const T*>(call.input);
      backward.grad_input = static_cast<T*>(call.output);
      backward.partial = partial;
      backward.mean = array<S>(call.mean);
      backward.var = array<S>(call.var);
      backward.weight = static_cast<const S*>(call.weight);
      backward.bias = static_cast<const S*>(call.bias);
      backward.eps = S(call.eps);
      backward.grad_weight = array<S>(call.grad_weight);
      backward.grad_bias = array<S>(call.grad_bias);
      if (sums_results) {
        backward.grad_input_sum = grid.parts > 1 ? result_sums : array<S>(call.grad_input_sum);
      }
      const auto run_step = [&](Step step, int64_t blocks) {
        backward.step = step;
        launch(
            backward_kernel<T, V, kByRow>, grid_of(blocks), dim3(grid.threads),
            tally_bytes<Sums<S, 2 * K>>(grid.threads) + Coefficients<S, K>::bytes(5, grid.columns),
            call.stream, grid, backward);
      };
      const int64_t blocks = grid.groups * grid.parts;
      if (grid.parts == 1) {
        run_step(Step::all, blocks);
      } else {
        run_step(Step::gather, blocks);
        run_step(Step::from_parts, maps ? blocks : grid.groups);  // those of the first part
      }
    }
  });
  if (sums_results && grid.parts > 1) {
    add_parts(result_sums, grid.parts, grid.channels, array<S>(call.grad_input_sum), call.stream);
  }
}

}  // namespace

void batch_norm_backward(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? backward<double>(call, true, arena)
                               : backward<float>(call, true, arena);
}

void channel_sum(const BatchNormCall& call, Arena& arena) {
  call.dtype == DType::float64 ? backward<double>(call, false, arena)
                               : backward<float>(call, false, arena);
}

}  // namespace convext::cuda
