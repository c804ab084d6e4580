// Direct convolution, backward_weight: a warp sums a tile of filters by taps over the pixels of one
// split. Its lanes differ in pixels, and in filters where those lie side by side (nhwc), so that
// what they read are neighbours; in the end lanes that differ in pixels add up. The splits' sums
// are added by a kernel of their own, always in the same order.
#include "cuda/kernels/conv2d_direct.h"
#include "cuda/kernels/fast_divisor.h"

namespace convext::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
// Sums of a lane, as many as a warp has lanes, see add_lanes.
constexpr int kSums = kLanes;
// Pixels that a lane sums in one chain, at most; the sums of chains are then added up, which keeps
// the error of a long sum near that of a short one.
constexpr int kChain = 64;

// How the pixels are split: until a large GPU has enough warps, and as long as a lane has pixels.
constexpr int64_t kEnoughWarps = 4096;
constexpr int64_t kFewestPixels = 8;
constexpr int64_t kMostSplits = 512;

// The taps of a tile: some input channels at one place of the kernel, or, where there are hardly
// any channels, neighbours in a row of the kernel.
enum class TapTile { channels, columns };

template <class Index>
struct WeightSums {
  Strides<Index> input, grad_output, weight;
  Index in_height, in_width, kernel_height, kernel_width;
  Index stride_height, stride_width, padding_height, padding_width;
  Index dilation_height, dilation_width;
  Index group_in_channels, group_out_channels;
  Index pixels, split_pixels, weights;
  Divisor<Index> out_columns, out_rows;  // a pixel is one of (image, row, column)
  // A warp is one of (split, group, tile of filters, tile of taps).
  int64_t warps;
  Divisor<Index> tap_tiles, filter_tiles, groups;
  // A tile of taps is one of (major, middle, minor): tile of channels, kernel row and column, or
  // channel, kernel row and tile of columns.
  Divisor<Index> middle, minor;
  int filter_lanes;  // a power of two
};

// Adds values up over lanes that are equal modulo `kept`, a power of two: value i of the result,
// i < kept, is the sum of what was value (lane - lane % kept + i). At every step a lane gives away
// the half that its partner keeps, so that it takes half the steps of adding every value
// everywhere.
template <int kHalf = kSums / 2, class S>
__device__ __forceinline__ void add_lanes(S (&values)[kSums], int lane, int kept) {
  if (kHalf < kept) return;
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const S given = upper ? values[i] : values[i + kHalf];
    const S mine = upper ? values[i + kHalf] : values[i];
    values[i] = mine + __shfl_xor_sync(~0u, given, kHalf);
  }
  if constexpr (kHalf > 1) add_lanes<kHalf / 2>(values, lane, kept);
}

// Sums go to `sums`, [split][weight], or rounded to grad_weight where that is null.
template <class T, class Index, TapTile kTile, int kFilters>
__global__ void __launch_bounds__(kThreads, sizeof(Sum<T>) + sizeof(Index) == 8 ? 3 : 2)
    weight_kernel(const T* input, const T* grad_output, T* grad_weight, Sum<T>* sums,
                  WeightSums<Index> g) {
  constexpr int kTaps = kSums / kFilters;
  constexpr bool kColumns = kTile == TapTile::columns;
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = block_index() * kWarps + threadIdx.x / kLanes;
  if (warp >= g.warps) return;
  const auto [rest, tap_tile] = g.tap_tiles.divide(Index(warp));
  const auto [split_and_group, filter_tile] = g.filter_tiles.divide(rest);
  const auto [split, group] = g.groups.divide(split_and_group);
  const auto [outer, minor] = g.minor.divide(tap_tile);
  const auto [major, middle] = g.middle.divide(outer);
  const Index channel = kColumns ? major : major * kTaps;
  const Index kernel_row = middle, kernel_column = kColumns ? minor * kTaps : minor;
  const Index taps_left = kColumns ? g.kernel_width - kernel_column : g.group_in_channels - channel;
  const int taps = int(taps_left < kTaps ? taps_left : kTaps);

  // Filters of a lane lie filter_lanes apart.
  const int filter_lane = lane & (g.filter_lanes - 1);
  const Index filter = filter_tile * (g.filter_lanes * kFilters) + filter_lane;
  const Index filters_left = (g.group_out_channels - filter + g.filter_lanes - 1) / g.filter_lanes;
  const int filters = int(filters_left < kFilters ? filters_left : kFilters);

  const Index to_row = kernel_row * g.dilation_height - g.padding_height;
  const Index to_column = kernel_column * g.dilation_width - g.padding_width;
  const T* const source = input + (group * g.group_in_channels + channel) * g.input.c;
  const T* const grads = grad_output + (group * g.group_out_channels + filter) * g.grad_output.c;
  const Index filter_step = g.filter_lanes * g.grad_output.c;

  Sum<T> total[kSums] = {};
  const int pixel_lanes = kLanes / g.filter_lanes;
  const Index first = split * g.split_pixels;
  const Index end = first + g.split_pixels < g.pixels ? first + g.split_pixels : g.pixels;
  for (Index chain = first + lane / g.filter_lanes; chain < end; chain += kChain * pixel_lanes) {
    Sum<T> sum[kSums] = {};
    const Index left = end - chain;
    const int steps = left < kChain * pixel_lanes ? int(left) : kChain * pixel_lanes;
#pragma unroll 2
    for (int i = 0; i < steps; i += pixel_lanes) {
      const auto [image_row, x] = g.out_columns.divide(chain + i);
      const auto [n, y] = g.out_rows.divide(image_row);
      const Index row = y * g.stride_height + to_row, column = x * g.stride_width + to_column;
      const bool met =
          row >= 0 && row < g.in_height && (kColumns || (column >= 0 && column < g.in_width));
      const T* const pixel = source + n * g.input.n + row * g.input.h;
      Sum<T> values[kTaps], grad[kFilters];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const Index at = kColumns ? column + t * g.dilation_width : column;
        const bool inside = met && t < taps && (!kColumns || (at >= 0 && at < g.in_width));
        values[t] =
            inside ? widen(pixel[at * g.input.w + (kColumns ? 0 : t * g.input.c)]) : Sum<T>(0);
      }
      const T* const results =
          grads + n * g.grad_output.n + y * g.grad_output.h + x * g.grad_output.w;
#pragma unroll
      for (int f = 0; f < kFilters; ++f) {
        grad[f] = f < filters ? widen(results[f * filter_step]) : Sum<T>(0);
      }
#pragma unroll
      for (int f = 0; f < kFilters; ++f) {
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          sum[f * kTaps + t] = multiply_add(grad[f], values[t], sum[f * kTaps + t]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] += sum[i];
  }
  add_lanes(total, lane, g.filter_lanes);

#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int which = (lane & ~(g.filter_lanes - 1)) + i;
    const int f = which / kTaps, t = which % kTaps;
    if (i >= g.filter_lanes || f >= filters || t >= taps) continue;
    const Index at = (group * g.group_out_channels + filter + f * g.filter_lanes) * g.weight.n +
                     (kColumns ? channel : channel + t) * g.weight.c + kernel_row * g.weight.h +
                     (kColumns ? kernel_column + t : kernel_column) * g.weight.w;
    if (sums) {
      sums[split * int64_t(g.weights) + at] = total[i];
    } else {
      grad_weight[at] = narrow<T>(total[i]);
    }
  }
}

// Adds up the splits of 32 weights: eight threads a weight, each of every eighth split.
template <class T>
__global__ void __launch_bounds__(256)
    add_splits_kernel(const Sum<T>* sums, T* grad_weight, int64_t weights, int splits) {
  constexpr int kParts = 8;
  __shared__ Sum<T> parts[kParts][kLanes];
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  const int64_t weight = block_index() * kLanes + lane;
  Sum<T> sum = 0;
  if (weight < weights) {
#pragma unroll 4
    for (int split = part; split < splits; split += kParts) sum += sums[split * weights + weight];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part > 0 || weight >= weights) return;
  for (int i = 1; i < kParts; ++i) sum += parts[i][lane];
  grad_weight[weight] = narrow<T>(sum);
}

template <class T, class Index, TapTile kTile, int kFilters>
void run(const Conv2dCall& call, Arena& arena) {
  constexpr int kTaps = kSums / kFilters;
  const Conv2dProblem& p = call.problem;
  WeightSums<Index> g{};
  g.input = Strides<Index>::of_input(call);
  g.grad_output = Strides<Index>::of_output(call);
  g.weight = Strides<Index>::of_weight(call);
  g.in_height = p.in_height, g.in_width = p.in_width;
  g.kernel_height = p.kernel_height, g.kernel_width = p.kernel_width;
  g.stride_height = p.stride_height, g.stride_width = p.stride_width;
  g.padding_height = p.padding_height, g.padding_width = p.padding_width;
  g.dilation_height = p.dilation_height, g.dilation_width = p.dilation_width;
  g.group_in_channels = p.group_in_channels(), g.group_out_channels = p.group_out_channels();
  g.pixels = p.out_pixels();
  g.weights = p.out_channels * p.group_in_channels() * p.kernel_taps();
  g.out_columns = Divisor<Index>(p.out_width());
  g.out_rows = Divisor<Index>(p.out_height());

  const bool nhwc = call.layout == Layout::nhwc;
  g.filter_lanes = nhwc ? power_of_two_from(ceil_div(g.group_out_channels, kFilters), kLanes) : 1;
  const int64_t pixel_lanes = kLanes / g.filter_lanes;
  const int64_t filter_tiles = ceil_div(g.group_out_channels, kFilters * g.filter_lanes);
  const bool columns = kTile == TapTile::columns;
  const int64_t minor = columns ? ceil_div(p.kernel_width, kTaps) : p.kernel_width;
  const int64_t major = columns ? p.group_in_channels() : ceil_div(p.group_in_channels(), kTaps);
  const int64_t tap_tiles = minor * p.kernel_height * major;
  const int64_t tiles = tap_tiles * filter_tiles * p.groups;
  const int64_t splits = std::max<int64_t>(
      1, std::min({kMostSplits, kEnoughWarps / tiles, g.pixels / (pixel_lanes * kFewestPixels)}));
  // Whole rounds of the lanes, and no split without pixels.
  g.split_pixels = round_up(std::max<int64_t>(1, ceil_div(g.pixels, splits)), pixel_lanes);
  const int64_t used = std::max<int64_t>(1, ceil_div(g.pixels, g.split_pixels));
  g.warps = tiles * used;
  g.tap_tiles = Divisor<Index>(tap_tiles);
  g.filter_tiles = Divisor<Index>(filter_tiles);
  g.groups = Divisor<Index>(p.groups);
  g.middle = Divisor<Index>(p.kernel_height);
  g.minor = Divisor<Index>(minor);

  Sum<T>* const sums = used > 1 ? arena.take<Sum<T>>(used * g.weights) : nullptr;
  if (arena.counting()) return;
  T* const grad_weight = static_cast<T*>(call.output);
  launch(weight_kernel<T, Index, kTile, kFilters>, grid_of(ceil_div(g.warps, kWarps)),
         dim3(kThreads), 0, call.stream, static_cast<const T*>(call.input),
         static_cast<const T*>(call.grad_output), grad_weight, sums, g);
  if (used == 1) return;
  launch(add_splits_kernel<T>, grid_of(ceil_div(g.weights, kLanes)), dim3(256), 0, call.stream,
         static_cast<const Sum<T>*>(sums), grad_weight, int64_t(g.weights), int(used));
}

}  // namespace

void direct_weight(const Conv2dCall& call, Arena& arena) {
  const Conv2dProblem& p = call.problem;
  const bool few = p.group_in_channels() < 4 && p.kernel_width > 1;
  with_element_of(call.dtype, [&](auto element) {
    using T = decltype(element);
    if (!fits_31_bits(p)) {
      run<T, int64_t, TapTile::channels, 8>(call, arena);
    } else if (!few) {
      run<T, int32_t, TapTile::channels, 8>(call, arena);
    } else if (p.kernel_width > 4) {
      run<T, int32_t, TapTile::columns, 4>(call, arena);
    } else {
      run<T, int32_t, TapTile::columns, 8>(call, arena);
    }
  });
}

}  // namespace convext::cuda
