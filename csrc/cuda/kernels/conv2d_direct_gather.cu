// Direct convolution, forward and backward_input: every result gathers its products, which makes
// the two passes one kernel. A pixel of the target, which is output or grad_input, meets
// pixels of the source, which is input or grad_output, at regular distances along each axis.
//
// A thread sums a tile of pixels by channels, weights come through shared memory, a chunk of taps
// and source channels at a time, and the source straight from global memory, where neighbours in a
// warp find what the others have brought into the cache. Threads of a block differ first in pixels
// (nchw) or first in channels (nhwc), so that their stores, and the reads that differ, are of
// neighbours.
#include <bit>
#include <numeric>

#include "cuda/kernels/conv2d_direct.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/fast_divisor.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 128;
// Of weights in shared memory: few enough that four blocks and more share a multiprocessor.
constexpr int kWeightBytes = 16 << 10;
// Of a chunk, where there are more: that many neighbours are worth reading.
constexpr int kChunkChannels = 16;
// Taps times channels of a chunk, at most.
constexpr int kChunk = 256;
// Products in a row that are summed in one chain, at most; the sums of chains are then added up,
// which keeps the error of a long sum near that of a short one.
constexpr int kChain = 64;

// One axis, as both passes see it. Targets come in classes that meet the same taps: one in forward;
// in backward_input, where target t meets tap k if t + padding - k * dilation is a multiple of the
// stride, one for each t modulo the stride (Dumoulin and Visin, "A guide to convolution arithmetic
// for deep learning", 2016, section 4.6).
template <class Index>
struct Axis {
  Index targets, sources, taps, stride, padding, dilation;
  Index common;       // greatest divisor of stride and dilation
  Index classes;      // that have targets
  Index class_limit;  // targets of the largest class
  bool backward;

  static Axis of(int64_t input, int64_t output, int64_t taps, int64_t stride, int64_t padding,
                 int64_t dilation, bool backward) {
    Axis axis{};
    axis.targets = backward ? input : output;
    axis.sources = backward ? output : input;
    axis.taps = taps;
    axis.stride = stride;
    axis.padding = padding;
    axis.dilation = dilation;
    axis.common = std::gcd(stride, dilation);
    axis.classes = backward ? std::min(stride, input) : 1;
    axis.class_limit = backward ? ceil_div(input, stride) : output;
    axis.backward = backward;
    return axis;
  }
};

// Target i of a class is first_target + i * target_step; with tap j of the class, which is
// first_tap + j * tap_step of the kernel, it meets source
// first_source + i * source_step + j * source_tap_step.
template <class Index>
struct AxisClass {
  Index targets, first_target, target_step;
  Index taps, first_tap, tap_step;
  Index first_source, source_step, source_tap_step;

  __device__ AxisClass(const Axis<Index>& axis, Index which) {
    if (!axis.backward) {
      targets = axis.targets, first_target = 0, target_step = 1;
      taps = axis.taps, first_tap = 0, tap_step = 1;
      first_source = -axis.padding, source_step = axis.stride, source_tap_step = axis.dilation;
      return;
    }
    targets = (axis.targets - which + axis.stride - 1) / axis.stride;
    first_target = which, target_step = axis.stride;
    // Multiples of the dilation repeat, modulo the stride, after tap_step of them.
    tap_step = axis.stride / axis.common;
    const Index candidates = axis.taps < tap_step ? axis.taps : tap_step;
    const Index wanted = (which + axis.padding) % axis.stride;
    for (first_tap = 0; first_tap < candidates; ++first_tap) {
      if (first_tap * axis.dilation % axis.stride == wanted) break;
    }
    taps = first_tap == candidates ? 0 : (axis.taps - first_tap + tap_step - 1) / tap_step;
    first_source = (which + axis.padding - first_tap * axis.dilation) / axis.stride;
    source_step = 1, source_tap_step = -(axis.dilation / axis.common);
  }
};

// The length of the fewest equal parts of n that are no longer than `most`.
int equal_parts(int64_t n, int64_t most) {
  return int(ceil_div(n, ceil_div(n, most)));
}

template <class Index>
struct Gather {
  Axis<Index> rows, columns;
  Strides<Index> source, target;
  // Distances in the weight.
  Index weight_source, weight_target, weight_group, weight_row, weight_column;
  Index source_channels, target_channels;  // of a group
  Index pixels;                            // slots: every class has as many as the largest
  int64_t blocks;
  // A block is one of (class, group, tile of pixels, tile of channels).
  Divisor<Index> channel_tiles, pixel_tiles, groups, column_classes;
  Divisor<Index> class_columns, class_rows;  // a slot is one of (image, row, column)
  // Threads of a block along channels, a power of two: 2^channel_bits.
  int channel_bits;
  bool channels_first;  // whether neighbouring threads differ in channels
  // A chunk is chunk_taps by chunk_channels, kept at [tap][channel][target channel].
  int chunk_taps, chunk_channels;
  int chain_taps;        // that are summed in one chain, with all channels of a chunk
  int weight_pitch;      // from one [tap][channel] to the next
  bool targets_fastest;  // in the weight, among neighbours in memory; else what `fastest` counts
  bool taps_fastest;
  FastDivisor chunk, fastest;  // chunk_taps * chunk_channels; of the axis that is fastest of both
};

template <class T, class Index, int kPixels, int kChannels>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 4 ? 4 : 2)
    gather_kernel(const T* source, const T* weight, T* target, Gather<Index> g,
                  Epilogue<T> epilogue) {
  if (block_index() >= g.blocks) return;
  const auto [tile_and_rest, channel_tile] = g.channel_tiles.divide(Index(block_index()));
  const auto [group_and_class, pixel_tile] = g.pixel_tiles.divide(tile_and_rest);
  const auto [classes, group] = g.groups.divide(group_and_class);
  const auto [row_class, column_class] = g.column_classes.divide(classes);
  const AxisClass<Index> rows(g.rows, row_class), columns(g.columns, column_class);

  const int channel_lanes = 1 << g.channel_bits, pixel_lanes = kThreads >> g.channel_bits;
  const int thread = threadIdx.x;
  const int channel_lane = g.channels_first ? thread & (channel_lanes - 1) : thread / pixel_lanes;
  const int pixel_lane = g.channels_first ? thread >> g.channel_bits : thread & (pixel_lanes - 1);
  const int tile_channels = channel_lanes * kChannels;
  const int tile_bits = g.channel_bits + std::bit_width(unsigned(kChannels)) - 1;
  const Index first_channel = channel_tile * tile_channels;

  // Sources that a pixel meets with tap (0, 0) of its class; far outside for a slot that is none.
  Index image[kPixels], first_row[kPixels], first_column[kPixels];
  const Index first_slot = pixel_tile * (pixel_lanes * kPixels) + pixel_lane;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const Index slot = first_slot + i * pixel_lanes;
    const auto [image_row, column] = g.class_columns.divide(slot);
    const auto [n, row] = g.class_rows.divide(image_row);
    const bool used = slot < g.pixels && row < rows.targets && column < columns.targets;
    image[i] = n * g.source.n + group * g.source_channels * g.source.c;
    first_row[i] = rows.first_source + row * rows.source_step;
    first_column[i] = columns.first_source + column * columns.source_step;
    if (!used) image[i] = -1;
  }

  Sum<T>* const weights = dynamic_shared<Sum<T>>();
  // Of every tap of a chunk: where its weights lie, and how far its source is.
  Index* const tap_weight =
      reinterpret_cast<Index*>(weights + g.chunk_taps * g.chunk_channels * g.weight_pitch);
  Index* const tap_row = tap_weight + g.chunk_taps;
  Index* const tap_column = tap_row + g.chunk_taps;

  Sum<T> total[kPixels][kChannels] = {};
  const Index taps = rows.taps * columns.taps;
  for (Index first_tap = 0; first_tap < taps; first_tap += g.chunk_taps) {
    const int tap_count = int(taps - first_tap < g.chunk_taps ? taps - first_tap : g.chunk_taps);
    __syncthreads();  // nobody needs the last chunk any more
    for (int i = thread; i < tap_count; i += kThreads) {
      const Index row = (first_tap + i) / columns.taps, column = (first_tap + i) % columns.taps;
      tap_weight[i] = (rows.first_tap + row * rows.tap_step) * g.weight_row +
                      (columns.first_tap + column * columns.tap_step) * g.weight_column;
      tap_row[i] = row * rows.source_tap_step;
      tap_column[i] = column * columns.source_tap_step;
    }
    for (Index first = 0; first < g.source_channels; first += g.chunk_channels) {
      const int count = int(g.source_channels - first < g.chunk_channels ? g.source_channels - first
                                                                         : g.chunk_channels);
      __syncthreads();
      const int chunk = g.chunk.divisor();
      const T* const chunk_weight = weight + group * g.weight_group +
                                    first_channel * g.weight_target + first * g.weight_source;
      // Several at a time, for each waits for memory.
      constexpr int kLoads = 4;
      for (int load = thread; load < chunk * tile_channels; load += kLoads * kThreads) {
        Sum<T> loaded[kLoads];
        int to[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const int i = load + j * kThreads;
          int channel, rest;
          if (g.targets_fastest) {
            channel = i & (tile_channels - 1), rest = i >> tile_bits;
          } else {
            const auto divided = g.chunk.divide(i);
            channel = divided.quotient, rest = divided.remainder;
          }
          const auto [major, minor] = g.fastest.divide(rest);
          const int tap = g.taps_fastest ? minor : major, c = g.taps_fastest ? major : minor;
          const bool used = i < chunk * tile_channels && tap < tap_count && c < count;
          to[j] = used ? (tap * g.chunk_channels + c) * g.weight_pitch + channel : -1;
          const bool exists = used && channel < g.target_channels - first_channel;
          loaded[j] = exists ? widen(chunk_weight[channel * g.weight_target + c * g.weight_source +
                                                  tap_weight[tap]])
                             : Sum<T>(0);
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          if (to[j] >= 0) weights[to[j]] = loaded[j];
        }
      }
      __syncthreads();

      for (int chain = 0; chain < tap_count; chain += g.chain_taps) {
        const int end = chain + g.chain_taps < tap_count ? chain + g.chain_taps : tap_count;
        Sum<T> sum[kPixels][kChannels] = {};
        for (int tap = chain; tap < end; ++tap) {
          Index at[kPixels];
          bool met = false;
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            const Index row = first_row[i] + tap_row[tap];
            const Index column = first_column[i] + tap_column[tap];
            const bool inside = image[i] >= 0 && row >= 0 && row < g.rows.sources && column >= 0 &&
                                column < g.columns.sources;
            at[i] = inside ? image[i] + row * g.source.h + column * g.source.w + first * g.source.c
                           : Index(-1);
            met |= inside;
          }
          if (!met) continue;
          const Sum<T>* tap_weights =
              weights + tap * g.chunk_channels * g.weight_pitch + channel_lane * kChannels;
#pragma unroll(kPixels == 1 ? 4 : 2)
          for (int c = 0; c < count; ++c) {
            Sum<T> w[kChannels];
            load_neighbours(w, tap_weights + c * g.weight_pitch);
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
              if (at[i] < 0) continue;
              const Sum<T> x = widen(source[at[i] + c * g.source.c]);
#pragma unroll
              for (int j = 0; j < kChannels; ++j) sum[i][j] = multiply_add(x, w[j], sum[i][j]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
#pragma unroll
          for (int j = 0; j < kChannels; ++j) total[i][j] += sum[i][j];
        }
      }
    }
  }

  const Index channel = first_channel + channel_lane * kChannels;
  if (channel >= g.target_channels) return;
  const Index room = g.target_channels - channel;
  const int count = int(room < kChannels ? room : kChannels);
  const Index group_channel = group * g.target_channels + channel;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    if (image[i] < 0) continue;
    const Index slot = first_slot + i * pixel_lanes;
    const auto [image_row, column] = g.class_columns.divide(slot);
    const auto [n, row] = g.class_rows.divide(image_row);
    T* const to = target + n * g.target.n + group_channel * g.target.c +
                  (rows.first_target + row * rows.target_step) * g.target.h +
                  (columns.first_target + column * columns.target_step) * g.target.w;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (j < count) total[i][j] = epilogue(total[i][j], group_channel + j);
    }
    if (g.target.c == 1) {
      store_neighbours(to, total[i], count);
    } else {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (j < count) to[j * g.target.c] = narrow<T>(total[i][j]);
      }
    }
  }
}

template <class T, class Index, int kPixels, int kChannels>
void run(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const bool backward = call.pass == Conv2dPass::backward_input;
  Gather<Index> g{};
  g.rows = Axis<Index>::of(p.in_height, p.out_height(), p.kernel_height, p.stride_height,
                           p.padding_height, p.dilation_height, backward);
  g.columns = Axis<Index>::of(p.in_width, p.out_width(), p.kernel_width, p.stride_width,
                              p.padding_width, p.dilation_width, backward);
  const Strides<Index> input = Strides<Index>::of_input(call);
  const Strides<Index> output = Strides<Index>::of_output(call);
  const Strides<Index> filter = Strides<Index>::of_weight(call);
  g.source = backward ? output : input;
  g.target = backward ? input : output;
  g.weight_source = backward ? filter.n : filter.c;
  g.weight_target = backward ? filter.c : filter.n;
  g.weight_group = p.group_out_channels() * filter.n;
  g.weight_row = filter.h;
  g.weight_column = filter.w;
  g.source_channels = backward ? p.group_out_channels() : p.group_in_channels();
  g.target_channels = backward ? p.group_in_channels() : p.group_out_channels();
  g.pixels = p.batch * g.rows.class_limit * g.columns.class_limit;
  g.class_columns = Divisor<Index>(g.columns.class_limit);
  g.class_rows = Divisor<Index>(g.rows.class_limit);

  const bool nhwc = call.layout == Layout::nhwc;
  g.channels_first = nhwc;
  // A warp stays within neighbouring pixels where those lie side by side.
  const int most_lanes = nhwc ? kThreads / (2 * kPixels) : kThreads / 32;
  const int lanes = power_of_two_from(ceil_div(g.target_channels, kChannels), most_lanes);
  while (1 << g.channel_bits < lanes) ++g.channel_bits;
  const int tile_channels = lanes * kChannels, tile_pixels = kThreads / lanes * kPixels;
  const int64_t channel_tiles = ceil_div(g.target_channels, tile_channels);
  const int64_t pixel_tiles = ceil_div(g.pixels, tile_pixels);
  g.blocks = channel_tiles * pixel_tiles * p.groups * g.rows.classes * g.columns.classes;
  g.channel_tiles = Divisor<Index>(channel_tiles);
  g.pixel_tiles = Divisor<Index>(pixel_tiles);
  g.groups = Divisor<Index>(p.groups);
  g.column_classes = Divisor<Index>(g.columns.classes);

  // Rows of shared memory that begin in other banks, for the threads that write a column.
  g.weight_pitch = tile_channels + Pack<Sum<T>>::kCount;
  const int64_t taps = ceil_div(p.kernel_height, backward ? p.stride_height / g.rows.common : 1) *
                       ceil_div(p.kernel_width, backward ? p.stride_width / g.columns.common : 1);
  const int64_t most = std::min<int64_t>(kWeightBytes / sizeof(Sum<T>) / tile_channels, kChunk);
  const int64_t channels = std::max<int64_t>(g.source_channels, 1);
  int64_t chunk_channels = std::min({channels, most, int64_t(kChunkChannels)});
  g.chunk_taps = equal_parts(taps, most / chunk_channels);
  if (g.chunk_taps == taps) chunk_channels = std::min<int64_t>(most / taps, kChain);
  g.chunk_channels = equal_parts(channels, chunk_channels);
  g.chain_taps = equal_parts(g.chunk_taps, std::max(1, kChain / g.chunk_channels));
  g.targets_fastest = g.weight_target == 1 && g.weight_source != 1;
  g.taps_fastest = !nhwc;
  g.chunk = FastDivisor(g.chunk_taps * g.chunk_channels);
  g.fastest = FastDivisor(g.taps_fastest ? g.chunk_taps : g.chunk_channels);
  const size_t shared = g.chunk_taps * g.chunk_channels * g.weight_pitch * sizeof(Sum<T>) +
                        3 * g.chunk_taps * sizeof(Index);

  Conv2dCall plain = call;
  if (backward) plain.bias = nullptr, plain.epilogue = {};
  launch(gather_kernel<T, Index, kPixels, kChannels>, grid_of(g.blocks), dim3(kThreads), shared,
         call.stream, static_cast<const T*>(backward ? call.grad_output : call.input),
         static_cast<const T*>(call.weight), static_cast<T*>(call.output), g, Epilogue<T>(plain));
}

}  // namespace

void direct_gather(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const bool forward = call.pass == Conv2dPass::forward;
  const int64_t pixels = forward ? p.out_pixels() : p.batch * p.in_height * p.in_width;
  const int64_t channels = forward ? p.group_out_channels() : p.group_in_channels();
  // The most results a thread that still leave every multiprocessor of a large GPU several warps.
  constexpr int64_t kEnoughThreads = 132 * 256;
  const bool many_channels = channels > 4;
  const bool many = pixels * p.groups * ceil_div(channels, 4) >= 4 * kEnoughThreads;
  const bool very_many = pixels * p.groups * ceil_div(channels, 8) >= 4 * kEnoughThreads;
  with_element_of(call.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPixels = sizeof(T) == 8 ? 2 : 4;
    if (!fits_31_bits(p)) {
      run<T, int64_t, kPixels, 4>(call);
      return;
    }
    if constexpr (sizeof(T) < 8) {
      if (very_many && many_channels) return run<T, int32_t, kPixels, 8>(call);
    }
    if (many) {
      run<T, int32_t, kPixels, 4>(call);
    } else {
      run<T, int32_t, 1, 4>(call);
    }
  });
}

}  // namespace convext::cuda
