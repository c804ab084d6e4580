// Depthwise convolution of channels that lie side by side: a thread has a vector of neighbouring
// channels, so that each read of a warp is of whole lines. What strips beside each other read twice
// comes from the L1 cache. Filters lie tap by tap in shared memory.
#include <algorithm>
#include <bit>

#include "cuda/kernels/conv2d_depthwise.h"
#include "cuda/kernels/epilogue.h"

namespace convext::cuda {
namespace {

constexpr int kStrip = 4;  // results of a thread in forward, and pixels in grad_weight
constexpr int kThreads = 128, kWarps = kThreads / 32;
template <int kKernel>
constexpr int kBlocks = kKernel == 3 ? 3 : 2;  // of a multiprocessor, whose registers they share

// How a block's threads share channels and strips: 2^lane_bits threads side by side have
// neighbouring vectors of channels, the others further strips ("workers").
struct Sharing {
  int lane_bits, channel_blocks;
  int columns, strips;  // of an image
  int64_t items;        // strips of all images

  Sharing(int channels, int vector, int batch, int columns, int strips)
      : columns(columns), strips(strips), items(int64_t(batch) * strips * columns) {
    const int vectors = channels / vector;
    lane_bits = std::min(int(std::bit_width(unsigned(vectors - 1))), 5);
    channel_blocks = int(ceil_div(vectors, 1 << lane_bits));
  }

  __host__ __device__ int lanes() const { return 1 << lane_bits; }
  __host__ __device__ int workers() const { return kThreads >> lane_bits; }
  __device__ int lane() const { return threadIdx.x & (lanes() - 1); }
  __device__ int worker() const { return threadIdx.x >> lane_bits; }
};

// A strip's place.
struct Item {
  int image, strip, column;

  __device__ Item(const Sharing& s, int64_t index) {
    const Quotient row = divide(index, s.columns);
    const Quotient of_image = divide(row.quotient, s.strips);
    image = int(of_image.quotient);
    strip = of_image.remainder;
    column = row.remainder;
  }
};

// Elements that are read or written at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T of[kCount];
};

template <int kCount, bool kAligned = true, class T>
__device__ __forceinline__ Lanes<Sum<T>, kCount> load(const T* __restrict__ from) {
  Vector<T, kCount> vector;
  if constexpr (kAligned) {
    vector = *reinterpret_cast<const Vector<T, kCount>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) vector.of[i] = from[i];
  }
  Lanes<Sum<T>, kCount> lanes;
#pragma unroll
  for (int i = 0; i < kCount; ++i) lanes.of[i] = widen(vector.of[i]);
  return lanes;
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const Lanes<Sum<T>, kCount>& lanes) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.of[i] = narrow<T>(lanes.of[i]);
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// Reads a strip's source where it lies: some channels of an image, from row `top` and column
// `left`.
template <class T, int kCount, bool kAligned = true>
struct ImageSource {
  const T* __restrict__ image;
  int channels, height, width, top, left;
  int64_t pitch, first;

  __device__ ImageSource(const T* image, int channels, int height, int width, int top, int left)
      : image(image),
        channels(channels),
        height(height),
        width(width),
        top(top),
        left(left),
        pitch(int64_t(width) * channels),
        first(top * pitch + int64_t(left) * channels) {}

  __device__ __forceinline__ Lanes<Sum<T>, kCount> operator()(int row, int column) const {
    const int y = top + row, x = left + column;
    if (y < 0 || y >= height || x < 0 || x >= width) return Lanes<Sum<T>, kCount>::zero();
    return load<kCount, kAligned>(image + (first + row * pitch + column * channels));
  }
};

// The filters of a block's channels, by way of shared memory.
template <class T, int kTaps, int kCount>
__device__ __forceinline__ void load_filters(Lanes<Sum<T>, kCount> (&filter)[kTaps],
                                             const T* __restrict__ weight, const Sharing& s,
                                             int first_channel, int channels) {
  __shared__ Lanes<Sum<T>, kCount> filters[kTaps][32];
  const int count = std::min(s.lanes() * kCount, channels - first_channel) * kTaps;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int channel = i / kTaps;
    filters[i % kTaps][channel / kCount].of[channel % kCount] =
        widen(weight[int64_t(first_channel) * kTaps + i]);
  }
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) filter[tap] = filters[tap][s.lane()];
}

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocks<kKernel>)
    forward_kernel(const T* input, const T* weight, T* output, DepthwiseShape p, Sharing s,
                   Epilogue<T> epilogue) {
  constexpr int vector = depthwise_vector(kKernel);
  using V = Lanes<Sum<T>, vector>;
  const int first_channel = (blockIdx.x % s.channel_blocks << s.lane_bits) * vector;
  V filter[kKernel * kKernel], sum[kStrip];
  load_filters(filter, weight, s, first_channel, p.channels);
  const int channel = first_channel + s.lane() * vector;
  const int64_t index = int64_t(blockIdx.x / s.channel_blocks) * s.workers() + s.worker();
  if (channel >= p.channels || index >= s.items) return;
  const Item item(s, index);
  const int y = item.strip * kStrip;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) sum[i] = V::zero();
  forward_strip<kKernel, kStride>(
      sum, filter,
      ImageSource<T, vector>(input + item.image * p.in_size() * p.channels + channel, p.channels,
                             p.height, p.width, y * kStride - p.padding_height,
                             item.column * kStride - p.padding_width));
#pragma unroll
  for (int lane = 0; lane < vector; ++lane) {
    const ChannelEpilogue<T> finish(epilogue, channel + lane);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) sum[i].of[lane] = finish(sum[i].of[lane]);
  }
  T* to = output + item.image * p.out_size() * p.channels + channel;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (y + i >= p.out_height) break;
    store(to + (int64_t(y + i) * p.out_width + item.column) * p.channels, sum[i]);
  }
}

// Strips are of the q of grad_input_strip, from the first that reaches an input pixel.
template <int kStride>
constexpr int kGradStrip = kStrip / kStride;
template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocks<kKernel>)
    grad_input_kernel(const T* grad_output, const T* weight, T* grad_input, DepthwiseShape p,
                      Sharing s) {
  constexpr int vector = depthwise_vector(kKernel);
  constexpr int strip = kGradStrip<kStride>;
  constexpr int reach = kReach<kKernel, kStride>;
  using V = Lanes<Sum<T>, vector>;
  const int first_channel = (blockIdx.x % s.channel_blocks << s.lane_bits) * vector;
  V filter[kKernel * kKernel], sum[strip][kStride][kStride];
  load_filters(filter, weight, s, first_channel, p.channels);
  const int channel = first_channel + s.lane() * vector;
  const int64_t index = int64_t(blockIdx.x / s.channel_blocks) * s.workers() + s.worker();
  if (channel >= p.channels || index >= s.items) return;
  const Item item(s, index);
  const int top = p.padding_height / kStride + item.strip * strip;
  const int left = p.padding_width / kStride + item.column;
  clear(sum);
  grad_input_strip<kKernel, kStride>(
      sum, filter,
      ImageSource<T, vector>(grad_output + item.image * p.out_size() * p.channels + channel,
                             p.channels, p.out_height, p.out_width, top - reach, left - reach));
  T* to = grad_input + item.image * p.in_size() * p.channels + channel;
#pragma unroll
  for (int i = 0; i < strip; ++i) {
#pragma unroll
    for (int dy = 0; dy < kStride; ++dy) {
      const int y = (top + i) * kStride + dy - p.padding_height;
#pragma unroll
      for (int dx = 0; dx < kStride; ++dx) {
        const int x = left * kStride + dx - p.padding_width;
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
        store(to + (int64_t(y) * p.width + x) * p.channels, sum[i][dy][dx]);
      }
    }
  }
}

// A block's filters, and a part of the strips of their outputs.
template <class T, int kKernel, int kStride, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<kKernel>)
    grad_weight_kernel(const T* input, const T* grad_output, Sum<T>* partial, DepthwiseShape p,
                       Sharing s, int steps) {
  constexpr int vector = depthwise_vector(kKernel);
  constexpr int taps = kKernel * kKernel;
  using V = Lanes<Sum<T>, vector>;
  const int first_channel = (blockIdx.x % s.channel_blocks << s.lane_bits) * vector;
  const int part = blockIdx.x / s.channel_blocks;
  const int channel = first_channel + s.lane() * vector;
  const bool active = channel < p.channels;
  V sum[taps];
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) sum[tap] = V::zero();
  for (int step = 0; step < steps; ++step) {
    const int64_t index = (int64_t(part) * steps + step) * s.workers() + s.worker();
    if (!active || index >= s.items) break;
    const Item item(s, index);
    const int y = item.strip * kStrip, count = smaller(kStrip, p.out_height - y);
    const T* from = grad_output + item.image * p.out_size() * p.channels + channel;
    V gradient[kStrip];
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      gradient[i] = i < count
                        ? load<vector, kAligned>(
                              from + (int64_t(y + i) * p.out_width + item.column) * p.channels)
                        : V::zero();
    }
    grad_weight_strip<kKernel, kStride>(
        sum, gradient, count,
        ImageSource<T, vector, kAligned>(
            input + item.image * p.in_size() * p.channels + channel, p.channels, p.height, p.width,
            y * kStride - p.padding_height, item.column * kStride - p.padding_width));
  }
  // Over the workers, as a tree of fixed shape: first those of a warp, then the warps.
  __shared__ V warps[kWarps][32];
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int tap = 0; tap < taps; ++tap) {
    V value = sum[0];
#pragma unroll
    for (int i = 1; i < taps; ++i) {
      if (i == tap) value = sum[i];  // sums stay in registers
    }
    for (int other = s.lanes(); other < 32; other *= 2) {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        value.of[i] += __shfl_xor_sync(0xffffffffu, value.of[i], other);
      }
    }
    __syncthreads();  // the last tap's sums have been read
    warps[warp][threadIdx.x % 32] = value;
    __syncthreads();
    if (warp > 0 || s.worker() > 0 || !active) continue;
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      static_assert(kWarps == 4);
      const auto of = [&](int other) { return warps[other][threadIdx.x].of[i]; };
      partial[(int64_t(part) * p.channels + channel + i) * taps + tap] =
          (of(0) + of(1)) + (of(2) + of(3));
    }
  }
}

// --------------------------------------------------------------------------------------------------

// Strips that a thread sums up: enough that the tree costs little beside them, few enough for an
// exact sum and for many blocks where there is work for them.
int steps_of_a_part(const Sharing& s) {
  constexpr int64_t kEnough = 1024, kMost = 16;
  const int64_t steps = ceil_div(s.items, s.workers()) * s.channel_blocks / kEnough;
  return int(std::clamp<int64_t>(steps, 1, kMost));
}

bool is_aligned(std::initializer_list<const void*> operands, size_t bytes) {
  return std::all_of(operands.begin(), operands.end(),
                     [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

template <class T, int kKernel, int kStride>
void run(const Conv2dCall& call, Arena& arena) {
  constexpr int vector = depthwise_vector(kKernel);
  const DepthwiseShape p(call.problem);
  const auto input = static_cast<const T*>(call.input);
  const auto weight = static_cast<const T*>(call.weight);
  const auto grad_output = static_cast<const T*>(call.grad_output);
  const auto output = static_cast<T*>(call.output);
  const dim3 block(kThreads);
  const auto blocks = [](const Sharing& s) {
    return dim3(ceil_div(s.items, s.workers()) * s.channel_blocks);
  };
  const int out_strips = int(ceil_div(p.out_height, kStrip));
  if (call.pass == Conv2dPass::backward_weight) {
    const Sharing s(p.channels, vector, p.batch, p.out_width, out_strips);
    const int steps = steps_of_a_part(s);
    const int64_t parts = ceil_div(s.items, int64_t(steps) * s.workers());
    DepthwisePartials<T> partials{nullptr, int(parts), int64_t(p.channels) * p.taps()};
    partials.sums = arena.take<Sum<T>>(parts * partials.size);
    if (arena.counting()) return;
    if (parts > 0) {
      // The same sums in the same order wherever the operands begin.
      constexpr bool unaligned = vector == 1;  // which is then no kernel of its own
      const auto kernel = is_aligned({input, grad_output}, sizeof(T) * vector)
                              ? grad_weight_kernel<T, kKernel, kStride, true>
                              : grad_weight_kernel<T, kKernel, kStride, unaligned>;
      launch(kernel, dim3(parts * s.channel_blocks), block, 0, call.stream, input, grad_output,
             partials.sums, p, s, steps);
    }
    depthwise_sum(partials, call);
  } else if (arena.counting()) {
    return;
  } else if (call.pass == Conv2dPass::forward) {
    const Sharing s(p.channels, vector, p.batch, p.out_width, out_strips);
    launch(forward_kernel<T, kKernel, kStride>, blocks(s), block, 0, call.stream, input, weight,
           output, p, s, Epilogue<T>(call));
  } else {
    const auto targets = [](int padding, int size) {
      return (padding + size - 1) / kStride - padding / kStride + 1;
    };
    const Sharing s(p.channels, vector, p.batch, targets(p.padding_width, p.width),
                    int(ceil_div(targets(p.padding_height, p.height), kGradStrip<kStride>)));
    launch(grad_input_kernel<T, kKernel, kStride>, blocks(s), block, 0, call.stream, grad_output,
           weight, output, p, s);
  }
}

}  // namespace

void conv2d_depthwise_nhwc(const Conv2dCall& call, Arena& arena) {
  with_depthwise_strip(call, [&](auto element, auto kernel, auto stride) {
    run<decltype(element), kernel(), stride()>(call, arena);
  });
}

}  // namespace convext::cuda
