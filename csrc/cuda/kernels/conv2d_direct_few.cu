// Direct convolution from few input channels, as the first layer of a network has them: MNIST's
// one, a photograph's three. There the general kernel spends more on finding a tap's sources than
// on the few products that it finds there; here a block brings the patch of input that its pixels
// see into shared memory, padding and all, where every tap is at the same distance from every
// pixel.
#include "cuda/kernels/conv2d_direct.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/fast_divisor.h"

namespace convext::cuda {
namespace {

// Of a thread.
constexpr int kPixels = 4;
constexpr int kChannels = 8;
// Threads of a block along pixels; along channels there are up to four.
constexpr int kPixelLanes = 64;
constexpr int kChannelLanes = 4;
constexpr int kTilePixels = kPixelLanes * kPixels;
constexpr int kTileWidth = 32;
constexpr int kSharedBytes = 48 << 10;
// Products summed in one chain; see conv2d_direct_gather.cu.
constexpr int kChain = 64;

struct FewChannels {
  int32_t in_height, in_width, out_height, out_width;
  int32_t stride_height, padding_height, padding_width, dilation_height, dilation_width;
  int in_channels, out_channels, taps, kernel_height, kernel_width;
  Strides<int32_t> input, output, weight;
  // A block is one of (image, tile of rows, tile of columns).
  FastDivisor row_tiles, column_tiles;
  int tile_height;
  FastDivisor tile_width;
  // The patch, [channel][row][column modulo stride][column / stride], so that neighbouring pixels
  // read neighbours.
  FastDivisor stride_width;
  int patch_rows, patch_columns, phase_pitch, row_pitch, patch_size;
  // Of the patch in memory: a column, a channel and a row (nhwc) or a row and a column (nchw).
  bool nhwc;
  FastDivisor fastest, middle;
  int channel_lanes;

  static FewChannels of(const Conv2dCall& call) {
    const Conv2dProblem& p = call.problem;
    FewChannels g{};
    g.in_height = p.in_height, g.in_width = p.in_width;
    g.out_height = p.out_height(), g.out_width = p.out_width();
    g.stride_height = p.stride_height;
    g.padding_height = p.padding_height, g.padding_width = p.padding_width;
    g.dilation_height = p.dilation_height, g.dilation_width = p.dilation_width;
    g.in_channels = p.in_channels, g.out_channels = p.out_channels;
    g.kernel_height = p.kernel_height, g.kernel_width = p.kernel_width;
    g.taps = p.in_channels * p.kernel_taps();
    g.input = Strides<int32_t>::of_input(call);
    g.output = Strides<int32_t>::of_output(call);
    g.weight = Strides<int32_t>::of_weight(call);
    // Tiles of equal width, as high as they may be.
    const int32_t columns = ceil_div(g.out_width, ceil_div(g.out_width, kTileWidth));
    g.tile_width = FastDivisor(columns);
    g.column_tiles = FastDivisor(ceil_div(g.out_width, columns));
    const int32_t most_rows = std::min(g.out_height, kTilePixels / columns);
    g.tile_height = ceil_div(g.out_height, ceil_div(g.out_height, most_rows));
    g.row_tiles = FastDivisor(ceil_div(g.out_height, g.tile_height));
    g.stride_width = FastDivisor(p.stride_width);
    const int32_t reach = (g.kernel_width - 1) * g.dilation_width;
    g.patch_rows =
        (g.tile_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1;
    g.patch_columns = (columns - 1) * p.stride_width + reach + 1;
    g.phase_pitch = columns + reach / p.stride_width;
    g.row_pitch = p.stride_width * g.phase_pitch;
    g.patch_size = g.in_channels * g.patch_rows * g.row_pitch;
    g.nhwc = call.layout == Layout::nhwc;
    g.fastest = FastDivisor(g.nhwc ? g.in_channels : g.patch_columns);
    g.middle = FastDivisor(g.nhwc ? g.patch_columns : g.patch_rows);
    g.channel_lanes = power_of_two_from(ceil_div(g.out_channels, kChannels), kChannelLanes);
    return g;
  }

  // In shared memory: weights, the patch, and where in it the taps are.
  int weight_pitch() const { return channel_lanes * kChannels; }
  int64_t shared_bytes() const {
    return (int64_t(taps) * weight_pitch() + patch_size) * sizeof(float) + taps * sizeof(int);
  }
};

template <class T>
__global__ void __launch_bounds__(kPixelLanes* kChannelLanes)
    few_channels_kernel(const T* input, const T* weight, T* output, FewChannels g, int weight_pitch,
                        Epilogue<T> epilogue) {
  const auto [image_and_row, column_tile] = g.column_tiles.divide(blockIdx.x);
  const auto [n, row_tile] = g.row_tiles.divide(image_and_row);
  const int tile_width = g.tile_width.divisor(), thread = threadIdx.x, threads = blockDim.x;
  const int first_row = row_tile * g.tile_height, first_column = column_tile * tile_width;

  float* const weights = dynamic_shared<float>();
  float* const patch = weights + g.taps * weight_pitch;
  int* const tap_source = reinterpret_cast<int*>(patch + g.patch_size);

  // (channel, kernel row, kernel column), in this order whatever the layout.
  for (int i = thread; i < g.taps; i += threads) {
    const int column = i % g.kernel_width, rest = i / g.kernel_width;
    const int row = rest % g.kernel_height, channel = rest / g.kernel_height;
    const auto [across, phase] = g.stride_width.divide(column * g.dilation_width);
    tap_source[i] = (channel * g.patch_rows + row * g.dilation_height) * g.row_pitch +
                    phase * g.phase_pitch + across;
  }
  const int top = first_row * g.stride_height - g.padding_height;
  const int left = first_column * g.stride_width.divisor() - g.padding_width;
  const T* const image = input + n * g.input.n;
  const int patch_elements = g.in_channels * g.patch_rows * g.patch_columns;
  for (int i = thread; i < patch_elements; i += threads) {
    const auto [rest, fastest] = g.fastest.divide(i);
    const auto [slowest, middle] = g.middle.divide(rest);
    const int channel = g.nhwc ? fastest : slowest;
    const int row = g.nhwc ? slowest : middle, column = g.nhwc ? middle : fastest;
    const int h = top + row, w = left + column;
    const bool inside = h >= 0 && h < g.in_height && w >= 0 && w < g.in_width;
    const auto [across, phase] = g.stride_width.divide(column);
    patch[(channel * g.patch_rows + row) * g.row_pitch + phase * g.phase_pitch + across] =
        inside ? widen(image[channel * g.input.c + h * g.input.h + w * g.input.w]) : 0.0f;
  }

  const int pixel_lane = thread % kPixelLanes, channel_lane = thread / kPixelLanes;
  int source[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int slot = pixel_lane + i * kPixelLanes;
    const auto [row, column] = g.tile_width.divide(slot);
    // A slot that is no pixel reads what the first one reads.
    source[i] = row < g.tile_height ? row * g.stride_height * g.row_pitch + column : 0;
  }

  const int tile_channels = weight_pitch;
  for (int first = 0; first < g.out_channels; first += tile_channels) {
    __syncthreads();  // nobody needs the last weights any more
    for (int tap = thread / tile_channels; tap < g.taps; tap += threads / tile_channels) {
      const int column = tap % g.kernel_width, rest = tap / g.kernel_width;
      const int row = rest % g.kernel_height, channel = rest / g.kernel_height;
      const int filter = thread % tile_channels;
      const bool exists = first + filter < g.out_channels;
      weights[tap * tile_channels + filter] =
          exists ? widen(weight[(first + filter) * g.weight.n + channel * g.weight.c +
                                row * g.weight.h + column * g.weight.w])
                 : 0.0f;
    }
    __syncthreads();

    float total[kPixels][kChannels] = {};
    for (int chain = 0; chain < g.taps; chain += kChain) {
      float sum[kPixels][kChannels] = {};
      const int end = chain + kChain < g.taps ? chain + kChain : g.taps;
#pragma unroll 2
      for (int tap = chain; tap < end; ++tap) {
        float w[kChannels];
        load_neighbours(w, weights + tap * tile_channels + channel_lane * kChannels);
        const float* const from = patch + tap_source[tap];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const float x = from[source[i]];
#pragma unroll
          for (int j = 0; j < kChannels; ++j) sum[i][j] = multiply_add(x, w[j], sum[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) total[i][j] += sum[i][j];
      }
    }

    const int channel = first + channel_lane * kChannels, count = g.out_channels - channel;
    if (count <= 0) continue;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int slot = pixel_lane + i * kPixelLanes;
      const auto [row, column] = g.tile_width.divide(slot);
      const int y = first_row + row, x = first_column + column;
      if (row >= g.tile_height || y >= g.out_height || x >= g.out_width) continue;
      T* const to =
          output + n * g.output.n + channel * g.output.c + y * g.output.h + x * g.output.w;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (j < count) total[i][j] = epilogue(total[i][j], channel + j);
      }
      if (g.nhwc) {
        store_neighbours(to, total[i], count);
      } else {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          if (j < count) to[j * g.output.c] = narrow<T>(total[i][j]);
        }
      }
    }
  }
}

template <class T>
void run(const Conv2dCall& call) {
  const FewChannels g = FewChannels::of(call);
  const int64_t blocks = call.problem.batch * g.row_tiles.divisor() * g.column_tiles.divisor();
  launch(few_channels_kernel<T>, dim3(blocks), dim3(kPixelLanes * g.channel_lanes),
         g.shared_bytes(), call.stream, static_cast<const T*>(call.input),
         static_cast<const T*>(call.weight), static_cast<T*>(call.output), g, g.weight_pitch(),
         Epilogue<T>(call));
}

}  // namespace

bool prefers_few_channels(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  if (call.pass != Conv2dPass::forward || call.dtype == DType::float64) return false;
  // With more channels the general kernel finds more products wherever it looks.
  if (p.groups != 1 || p.in_channels < 1 || p.in_channels > 4 || p.kernel_taps() == 1) return false;
  // A tile lies in one image and leaves threads idle where that is smaller.
  if (2 * p.out_height() * p.out_width() < kTilePixels || p.out_channels < 4) return false;
  // The patch of pixels far apart is mostly read in vain, and may be larger than there is room for.
  if (!fits_31_bits(p) || p.stride_height > 4 || p.stride_width > 4) return false;
  constexpr int64_t kMostReach = 64;  // taps
  if (p.kernel_height * p.dilation_height > kMostReach) return false;
  if (p.kernel_width * p.dilation_width > kMostReach) return false;
  return FewChannels::of(call).shared_bytes() <= kSharedBytes;
}

void direct_few_channels(const Conv2dCall& call) {
  with_element_of(call.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8) run<T>(call);
  });
}

}  // namespace convext::cuda
