// Depthwise convolution of planes that lie one after the other. A block loads a tile of a plane, or
// several small planes, with all that the kernel reaches, into shared memory; its threads have
// neighbouring columns, so that they read and write whole lines wherever a row begins.
#include <algorithm>
#include <bit>

#include "cuda/kernels/conv2d_depthwise.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/fast_divisor.h"

namespace convext::cuda {
namespace {

constexpr int kStrip = 4;       // results of a thread in forward, and pixels in grad_weight
constexpr int kColumns = 128;   // of a tile, at most
constexpr int kShared = 40960;  // bytes that a tile may take: a multiprocessor then holds two
constexpr int kWarps = kDepthwiseThreads / 32;
template <int kKernel>
constexpr int kBlocks = kKernel == 3 ? 4 : 2;  // of a multiprocessor, whose registers they share

// How targets (results, or what a sum runs over) are cut into tiles. Of one tile each thread has
// one strip at most, in the order of columns, strips, planes.
struct Tiling {
  int columns, strips, planes;  // of a tile
  int tiles_x, tiles_y, groups;
  int source_columns, source_rows;  // that a tile meets
  int pitch;                        // elements from row to row
  int lane_bits;                    // 2^lane_bits threads load a row together
  FastDivisor by_columns, by_strips, by_tiles_x, by_tiles_y, by_source_rows;

  // Step and span: how far apart sources of neighbouring targets are, and how many one meets.
  Tiling(int width, int height, int64_t plane_count, int strip, int step, int span, int size) {
    tiles_x = int(ceil_div(width, kColumns));
    columns = int(ceil_div(width, tiles_x));
    const int all_strips = int(ceil_div(height, strip));
    source_columns = (columns - 1) * step + span;
    pitch = int(round_up(source_columns, step));
    const int row_bytes = pitch * size;
    const auto rows = [&](int count) { return (count * strip - 1) * step + span; };
    strips = std::min(kDepthwiseThreads / columns, all_strips);
    while (strips > 1 && rows(strips) * row_bytes > kShared) --strips;
    tiles_y = int(ceil_div(all_strips, strips));
    strips = int(ceil_div(all_strips, tiles_y));
    source_rows = rows(strips);
    planes = 1;
    if (tiles_x == 1 && tiles_y == 1) {
      planes = int(std::min<int64_t>({kDepthwiseThreads / (columns * strips), plane_count,
                                      kShared / (source_rows * row_bytes)}));
      planes = std::max(planes, 1);
    }
    groups = int(ceil_div(plane_count, planes));
    lane_bits = std::min(int(std::bit_width(unsigned(source_columns - 1))), 5);
    by_columns = FastDivisor(columns);
    by_strips = FastDivisor(strips);
    by_tiles_x = FastDivisor(tiles_x);
    by_tiles_y = FastDivisor(tiles_y);
    by_source_rows = FastDivisor(source_rows);
  }

  int64_t tiles() const { return int64_t(tiles_x) * tiles_y * groups; }
  size_t shared_bytes(int size) const { return size_t(planes) * source_rows * pitch * size; }
};

// Where a block's tile lies, and what of it a thread has.
struct Place {
  int first_plane, plane;  // the latter within the tile
  int top, left;           // of the tile, in targets
  int strip, column;       // within the tile

  __device__ Place(const Tiling& t, int tile) {
    const auto columns = t.by_columns.divide(threadIdx.x);
    const auto strips = t.by_strips.divide(columns.quotient);
    column = columns.remainder;
    strip = strips.remainder;
    plane = strips.quotient;
    const auto x = t.by_tiles_x.divide(tile);
    const auto y = t.by_tiles_y.divide(x.quotient);
    left = x.remainder * t.columns;
    top = y.remainder * t.strips;
    first_plane = y.quotient * t.planes;
  }
};

// Columns of a row in shared memory: with a step of 2 first the even ones, then the odd ones, so
// that threads side by side read side by side.
template <int kStep>
__device__ __forceinline__ int position(int column, int pitch) {
  return kStep == 1 ? column : column % kStep * (pitch / kStep) + column / kStep;
}

// A tile of `planes` planes from `source` on, which are `distance` apart.
template <int kStep, class T>
__device__ __forceinline__ void load_tile(Sum<T>* tile, const T* __restrict__ source,
                                          int64_t distance, int planes, int top, int left,
                                          int height, int width, const Tiling& t) {
  const int lane = threadIdx.x & ((1 << t.lane_bits) - 1);
  for (int row = threadIdx.x >> t.lane_bits; row < t.planes * t.source_rows;
       row += kDepthwiseThreads >> t.lane_bits) {
    const auto [plane, row_of_plane] = t.by_source_rows.divide(row);
    const int y = top + row_of_plane;
    const bool inside = plane < planes && y >= 0 && y < height;
    const int64_t line = plane * distance + int64_t(y) * width;
#pragma unroll 4
    for (int column = lane; column < t.source_columns; column += 1 << t.lane_bits) {
      const int x = left + column;
      const bool read = inside && x >= 0 && x < width;
      tile[row * t.pitch + position<kStep>(column, t.pitch)] =
          read ? widen(source[line + x]) : Sum<T>(0);
    }
  }
}

template <class T, int kTaps>
__device__ __forceinline__ void load_filter(Lanes<Sum<T>, 1> (&filter)[kTaps],
                                            const T* __restrict__ weight) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) filter[tap].of[0] = widen(weight[tap]);
}

// Reads a strip's source from a tile.
template <int kStep, class S>
struct TileSource {
  const S* first;
  int pitch;

  __device__ TileSource(const S* tile, const Tiling& t, const Place& at, int strip)
      : first(tile + (at.plane * t.source_rows + at.strip * strip * kStep) * t.pitch + at.column),
        pitch(t.pitch) {}
  __device__ __forceinline__ Lanes<S, 1> operator()(int row, int column) const {
    return {first[row * pitch + position<kStep>(column, pitch)]};
  }
};

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, kBlocks<kKernel>)
    forward_kernel(const T* input, const T* weight, T* output, DepthwiseShape p, Tiling t,
                   Epilogue<T> epilogue) {
  using S = Sum<T>;
  S* tile = dynamic_shared<S>();
  const Place at(t, blockIdx.x);
  const int planes = std::min(t.planes, p.batch * p.channels - at.first_plane);
  load_tile<kStride>(tile, input + at.first_plane * p.in_size(), p.in_size(), planes,
                     at.top * kStrip * kStride - p.padding_height,
                     at.left * kStride - p.padding_width, p.height, p.width, t);
  __syncthreads();
  const int x = at.left + at.column, y = (at.top + at.strip) * kStrip;
  if (at.plane >= planes || x >= p.out_width || y >= p.out_height) return;
  const TileSource<kStride, S> source(tile, t, at, kStrip);
  const int plane = at.first_plane + at.plane;
  const int first_filter = plane % p.channels * p.multiplier;
  for (int m = 0; m < p.multiplier; ++m) {
    Lanes<S, 1> filter[kKernel * kKernel], sum[kStrip];
    load_filter(filter, weight + int64_t(first_filter + m) * (kKernel * kKernel));
#pragma unroll
    for (int i = 0; i < kStrip; ++i) sum[i] = Lanes<S, 1>::zero();
    forward_strip<kKernel, kStride>(sum, filter, source);
    T* to = output + (int64_t(plane) * p.multiplier + m) * p.out_size();
    const ChannelEpilogue<T> finish(epilogue, first_filter + m);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (y + i < p.out_height)
        to[int64_t(y + i) * p.out_width + x] = narrow<T>(finish(sum[i].of[0]));
    }
  }
}

// The targets are the q of grad_input_strip, from the first that reaches an input pixel.
template <int kStride>
constexpr int kGradStrip = kStrip / kStride;
template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, kBlocks<kKernel>)
    grad_input_kernel(const T* grad_output, const T* weight, T* grad_input, DepthwiseShape p,
                      Tiling t) {
  using S = Sum<T>;
  constexpr int strip = kGradStrip<kStride>;
  constexpr int reach = kReach<kKernel, kStride>;
  S* tile = dynamic_shared<S>();
  const Place at(t, blockIdx.x);
  const int planes = std::min(t.planes, p.batch * p.channels - at.first_plane);
  const int top = p.padding_height / kStride + at.top * strip;
  const int left = p.padding_width / kStride + at.left;
  const int first_filter = (at.first_plane + at.plane) % p.channels * p.multiplier;
  const TileSource<1, S> source(tile, t, at, strip);
  Lanes<S, 1> sum[strip][kStride][kStride];
  clear(sum);
  for (int m = 0; m < p.multiplier; ++m) {
    if (m > 0) __syncthreads();
    load_tile<1>(tile, grad_output + (int64_t(at.first_plane) * p.multiplier + m) * p.out_size(),
                 p.multiplier * p.out_size(), planes, top - reach, left - reach, p.out_height,
                 p.out_width, t);
    __syncthreads();
    if (at.plane >= planes) continue;
    Lanes<S, 1> filter[kKernel * kKernel];
    load_filter(filter, weight + int64_t(first_filter + m) * (kKernel * kKernel));
    grad_input_strip<kKernel, kStride>(sum, filter, source);
  }
  if (at.plane >= planes) return;
  T* to = grad_input + (at.first_plane + at.plane) * p.in_size();
#pragma unroll
  for (int i = 0; i < strip; ++i) {
#pragma unroll
    for (int dy = 0; dy < kStride; ++dy) {
      const int y = (top + at.strip * strip + i) * kStride + dy - p.padding_height;
#pragma unroll
      for (int dx = 0; dx < kStride; ++dx) {
        const int x = (left + at.column) * kStride + dx - p.padding_width;
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
        to[int64_t(y) * p.width + x] = narrow<T>(sum[i][dy][dx].of[0]);
      }
    }
  }
}

// One filter, and a part of the tiles of its outputs, whose planes are images.
template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, kBlocks<kKernel>)
    grad_weight_kernel(const T* input, const T* __restrict__ grad_output, Sum<T>* partial,
                       DepthwiseShape p, Tiling t, int tiles, int part_tiles) {
  using S = Sum<T>;
  constexpr int taps = kKernel * kKernel;
  S* tile = dynamic_shared<S>();
  const int o = blockIdx.x % p.filters, part = blockIdx.x / p.filters;
  const int channel = o / p.multiplier;
  Lanes<S, 1> sum[taps];
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) sum[tap] = Lanes<S, 1>::zero();
  const int first = part * part_tiles, end = std::min(first + part_tiles, tiles);
  for (int i = first; i < end; ++i) {
    const Place at(t, i);
    const int images = std::min(t.planes, p.batch - at.first_plane);
    const int x = at.left + at.column, y = (at.top + at.strip) * kStrip;
    const bool active = at.plane < images && x < p.out_width && y < p.out_height;
    const int count = active ? smaller(kStrip, p.out_height - y) : 0;
    Lanes<S, 1> gradient[kStrip];
    const T* from =
        grad_output + (int64_t(at.first_plane + at.plane) * p.filters + o) * p.out_size();
#pragma unroll
    for (int j = 0; j < kStrip; ++j) {
      gradient[j].of[0] = j < count ? widen(from[int64_t(y + j) * p.out_width + x]) : S(0);
    }
    if (i > first) __syncthreads();
    load_tile<kStride>(tile, input + (int64_t(at.first_plane) * p.channels + channel) * p.in_size(),
                       p.channels * p.in_size(), images,
                       at.top * kStrip * kStride - p.padding_height,
                       at.left * kStride - p.padding_width, p.height, p.width, t);
    __syncthreads();
    if (active) {
      grad_weight_strip<kKernel, kStride>(sum, gradient, count,
                                          TileSource<kStride, S>(tile, t, at, kStrip));
    }
  }
  // Over the threads, as a tree of fixed shape.
  __shared__ S warps[kWarps][taps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    S value = sum[tap].of[0];
#pragma unroll
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    if (lane == 0) warps[warp][tap] = value;
  }
  __syncthreads();
  if (threadIdx.x >= taps) return;
  S pairs[kWarps / 2];
#pragma unroll
  for (int i = 0; i < kWarps / 2; ++i) {
    pairs[i] = warps[2 * i][threadIdx.x] + warps[2 * i + 1][threadIdx.x];
  }
  static_assert(kWarps == 8);
  partial[(int64_t(part) * p.filters + o) * taps + threadIdx.x] =
      (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

// --------------------------------------------------------------------------------------------------

// Tiles in a part of a sum: long enough that the tree costs little beside it, short enough for an
// exact sum and for many blocks where there is work for them.
int tiles_of_a_part(int64_t tiles, int filters) {
  constexpr int64_t kEnough = 1024, kMost = 16;
  return int(std::clamp<int64_t>(tiles * filters / kEnough, 1, kMost));
}

template <class T, int kKernel, int kStride>
void run(const Conv2dCall& call, Arena& arena) {
  using S = Sum<T>;
  const DepthwiseShape p(call.problem);
  const int64_t planes = int64_t(p.batch) * p.channels;
  const auto input = static_cast<const T*>(call.input);
  const auto weight = static_cast<const T*>(call.weight);
  const auto grad_output = static_cast<const T*>(call.grad_output);
  const auto output = static_cast<T*>(call.output);
  const dim3 block(kDepthwiseThreads);
  if (call.pass == Conv2dPass::backward_weight) {
    const Tiling t(p.out_width, p.out_height, p.batch, kStrip, kStride, kKernel, sizeof(S));
    const int part_tiles = tiles_of_a_part(t.tiles(), p.filters);
    const int64_t parts = ceil_div(t.tiles(), part_tiles);
    DepthwisePartials<T> partials{nullptr, int(parts), int64_t(p.filters) * p.taps()};
    partials.sums = arena.take<S>(parts * partials.size);
    if (arena.counting()) return;
    if (parts > 0) {
      launch(grad_weight_kernel<T, kKernel, kStride>, dim3(parts * p.filters), block,
             t.shared_bytes(sizeof(S)), call.stream, input, grad_output, partials.sums, p, t,
             int(t.tiles()), part_tiles);
    }
    depthwise_sum(partials, call);
  } else if (arena.counting()) {
    return;
  } else if (call.pass == Conv2dPass::forward) {
    const Tiling t(p.out_width, p.out_height, planes, kStrip, kStride, kKernel, sizeof(S));
    launch(forward_kernel<T, kKernel, kStride>, dim3(t.tiles()), block, t.shared_bytes(sizeof(S)),
           call.stream, input, weight, output, p, t, Epilogue<T>(call));
  } else {
    const auto targets = [](int padding, int size) {
      return (padding + size - 1) / kStride - padding / kStride + 1;
    };
    const Tiling t(targets(p.padding_width, p.width), targets(p.padding_height, p.height), planes,
                   kGradStrip<kStride>, 1, kReach<kKernel, kStride> + 1, sizeof(S));
    launch(grad_input_kernel<T, kKernel, kStride>, dim3(t.tiles()), block,
           t.shared_bytes(sizeof(S)), call.stream, grad_output, weight, output, p, t);
  }
}

}  // namespace

void conv2d_depthwise_nchw(const Conv2dCall& call, Arena& arena) {
  with_depthwise_strip(call, [&](auto element, auto kernel, auto stride) {
    run<decltype(element), kernel(), stride()>(call, arena);
  });
}

}  // namespace convext::cuda
