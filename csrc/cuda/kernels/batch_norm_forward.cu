// Batch norm's forward pass. A channel's moments are gathered about its first value: differences
// from a value of the tensor lose nothing to a large mean. Every thread merges the moments of a few
// values at a time, so that a first value far from the others does no harm either.
#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/channel_items.h"
#include "cuda/kernels/channel_tally.h"
#include "cuda/kernels/normalization.h"

namespace convext::cuda {
namespace {

enum class Step {
  all,         // gather the moments of a channel in one block, and normalise
  gather,      // the parts' moments, to `partial`
  from_parts,  // merge them, and normalise
  from_moments,
  from_statistics
};

template <class T>
struct Forward {
  using S = Sum<T>;
  Step step;
  bool aligned, relu;
  const T* input;
  T* output;
  S* partial;          // [part][mean, rest, deviation][channel], less the channel's first value
  const S* deviation;  // from_moments
  S *mean, *var;
  const S *weight, *bias;
  S eps;
};

// The moments of values, less their channel's shift, of U items of which n are there.
template <bool kByRow, class S, int V, int U>
__device__ __forceinline__ Moments<S, kThreadChannels<kByRow, V>> moments_of(S (&x)[U][V], int n) {
  constexpr int K = kThreadChannels<kByRow, V>;
  Moments<S, K> moments{};
  moments.count = S(kByRow ? n : n * V);
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int v = 0; v < V; ++v) moments.mean[v % K] += u < n ? x[u][v] : S(0);
  }
  const S per_value = 1 / moments.count;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const S sum = moments.mean[k];
    moments.mean[k] = sum * per_value;
    // per_value has been rounded, the same way for all who have as many values.
    moments.rest[k] = multiply_add(-moments.mean[k], moments.count, sum) * per_value;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S apart = u < n ? x[u][v] - moments.mean[v % K] : S(0);
      moments.deviation[v % K] = multiply_add(apart, apart, moments.deviation[v % K]);
    }
  }
  return moments;
}

template <class T, int V, bool kByRow>
__global__ void __launch_bounds__(512) forward_kernel(ChannelGrid grid, Forward<T> call) {
  using S = Sum<T>;
  constexpr int K = kThreadChannels<kByRow, V>;
  constexpr int kAtOnce = V == 1 ? 8 : 4;
  using Tally = Moments<S, K>;
  const ChannelPlace place = ChannelPlace::of<kByRow, V>(grid);
  if (place.part >= grid.parts) return;
  const Coefficients<S, K> map{dynamic_shared<S>() + blockDim.x * kTallyValues<Tally>,
                               grid.columns};
  const bool gathers = call.step == Step::all || call.step == Step::gather;
  const bool shifts = gathers || call.step == Step::from_parts;

  S shift[K] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (shifts && place.inside && grid.count > 0) shift[k] = widen(call.input[place.first + k]);
  }
  Tally tally{};
  if (gathers) {
    for_items<kByRow, kAtOnce>(grid, place, [&](const int64_t (&at)[kAtOnce], int n) {
      S x[kAtOnce][V];
      read_items<T, V>(x, call.input, at, n, call.aligned);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[u][v] -= shift[v % K];
      }
      tally.merge(moments_of<kByRow>(x, n));
    });
  } else if (call.step == Step::from_parts && place.inside) {
    for (int64_t part = place.row; part < grid.parts; part += blockDim.x / grid.columns) {
      const S* from = call.partial + part * 3 * grid.channels + place.channel;
      Tally other{};
      other.count = S(items_of(grid, part) * (kByRow ? 1 : V));
#pragma unroll
      for (int k = 0; k < K; ++k) {
        other.mean[k] = from[k];
        other.rest[k] = from[grid.channels + k];
        other.deviation[k] = from[2 * grid.channels + k];
      }
      tally.merge(other);
    }
  }
  if (shifts) tally = merge_rows(tally, grid.columns, dynamic_shared<S>());

  if (call.step == Step::gather) {
    if (place.row > 0 || !place.inside) return;
    S* to = call.partial + place.part * 3 * grid.channels + place.channel;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = tally.mean[k];
      to[grid.channels + k] = tally.rest[k];
      to[2 * grid.channels + k] = tally.deviation[k];
    }
    return;
  }

  if (place.row == 0 && place.inside) {
    const S count = S(grid.count > 0 ? grid.count : 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = place.channel + k;
      S mean, rest = 0, var;
      if (shifts) {
        // Twice, so that all of the rest is smaller than what the mean can tell.
        mean = add_exactly(shift[k], tally.mean[k], rest);
        mean = add_exactly(mean, rest + tally.rest[k], rest);
        // A backward pass that tells by the rounded mean what a ReLU let through must find that the
        // forward pass has done so too.
        if (call.relu) rest = 0;
        var = tally.deviation[k] / count;
      } else {
        mean = call.mean[c];
        var = call.step == Step::from_moments ? call.deviation[c] / count : call.var[c];
      }
      if (place.part == 0 && shifts) call.mean[c] = mean;
      if (place.part == 0 && call.step != Step::from_statistics) call.var[c] = var;
      const Normalization<S> to(c, mean, rest, var, call.eps, call.weight, call.bias);
      map.at(0, k) = to.shift;
      map.at(1, k) = to.scale;
      map.at(2, k) = to.offset;
    }
  }
  __syncthreads();
  S scale[K], offset[K];
  map.read(0, shift);
  map.read(1, scale);
  map.read(2, offset);
  for_items<kByRow, kAtOnce>(grid, place, [&](const int64_t (&at)[kAtOnce], int n) {
    S x[kAtOnce][V];
    read_items<T, V>(x, call.input, at, n, call.aligned);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const S y = multiply_add(x[u][v] - shift[v % K], scale[v % K], offset[v % K]);
        x[u][v] = call.relu && y < 0 ? S(0) : y;  // a NaN stays one
      }
    }
    write_items<T, V>(call.output, at, n, call.aligned, x);
  });
}

// Runs the steps one after the other, each a kernel.
template <class... Steps>
void run(const BatchNormCall& call, const ChannelGrid& grid, void* partial, const void* deviation,
         Steps... steps) {
  with_items_of(call.dtype, grid, [&](auto element, auto vector, auto by_row) {
    using T = decltype(element);
    using S = Sum<T>;
    constexpr int V = decltype(vector)::value;
    constexpr bool kByRow = decltype(by_row)::value;
    constexpr int K = kThreadChannels<kByRow, V>;
    Forward<T> forward{};
    forward.aligned = lie_aligned<T, V>(call.input, call.output);
    forward.relu = call.relu == Relu::after_norm;
    forward.input = static_cast<const T*>(call.input);
    forward.output = static_cast<T*>(call.output);
    forward.partial = static_cast<S*>(partial);
    forward.deviation = static_cast<const S*>(deviation);
    forward.mean = static_cast<S*>(call.mean);
    forward.var = static_cast<S*>(call.var);
    forward.weight = static_cast<const S*>(call.weight);
    forward.bias = static_cast<const S*>(call.bias);
    forward.eps = S(call.eps);
    const auto run_step = [&](Step step) {
      forward.step = step;
      launch(forward_kernel<T, V, kByRow>, grid_of(grid.groups * grid.parts), dim3(grid.threads),
             tally_bytes<Moments<S, K>>(grid.threads) + Coefficients<S, K>::bytes(3, grid.columns),
             call.stream, grid, forward);
    };
    (run_step(steps), ...);
  });
}

}  // namespace

void batch_norm_train(const BatchNormCall& call, Arena& arena) {
  const ChannelGrid grid(call.problem, call.dtype, call.layout, true);
  const int64_t partials = grid.parts > 1 ? grid.parts * 3 * grid.channels : 0;
  void* partial = call.dtype == DType::float64 ? static_cast<void*>(arena.take<double>(partials))
                                               : arena.take<float>(partials);
  if (arena.counting() || grid.channels == 0) return;
  if (grid.parts == 1) {
    run(call, grid, nullptr, nullptr, Step::all);
  } else {
    run(call, grid, partial, nullptr, Step::gather, Step::from_parts);
  }
}

void batch_norm_by_moments(const BatchNormCall& call, const void* deviation, Arena& arena) {
  if (arena.counting() || call.problem.elements() == 0) return;
  const ChannelGrid grid(call.problem, call.dtype, call.layout, false);
  run(call, grid, nullptr, deviation, Step::from_moments);
}

void batch_norm_eval(const BatchNormCall& call, Arena& arena) {
  if (arena.counting() || call.problem.elements() == 0) return;
  const ChannelGrid grid(call.problem, call.dtype, call.layout, false);
  run(call, grid, nullptr, nullptr, Step::from_statistics);
}

}  // namespace convext::cuda
