// Depthwise convolution: the choice among its kernels, those for any kernel, stride and dilation,
// and the sum of partial sums. Any number of filters a channel.
#include <algorithm>
#include <bit>
#include <climits>
#include <numeric>

#include "cuda/kernels/conv2d_depthwise.h"
#include "cuda/kernels/epilogue.h"

namespace convext::cuda {
namespace {

// Distances between neighbours along each axis of an image tensor, in elements.
struct Strides {
  int64_t n, c, y, x;

  Strides(Layout layout, int channels, int height, int width) {
    const int64_t size = int64_t(height) * width;
    if (layout == Layout::nchw) {
      *this = {channels * size, size, width, 1};
    } else {
      *this = {channels * size, 1, int64_t(width) * channels, channels};
    }
  }
  __device__ int64_t at(int image, int channel) const { return image * n + channel * c; }

 private:
  Strides(int64_t n, int64_t c, int64_t y, int64_t x) : n(n), c(c), y(y), x(x) {}
};

// The index-th element of an image tensor, in the order in which it lies.
struct Element {
  int image, channel, y, x;

  __device__ Element(int64_t index, bool channels_last, int channels, int height, int width) {
    const int sizes[3] = {channels_last ? channels : width, channels_last ? width : height,
                          channels_last ? height : channels};
    const Quotient first = divide(index, sizes[0]);
    const Quotient second = divide(first.quotient, sizes[1]);
    const Quotient third = divide(second.quotient, sizes[2]);
    image = int(third.quotient);
    channel = channels_last ? first.remainder : third.remainder;
    y = channels_last ? third.remainder : second.remainder;
    x = channels_last ? second.remainder : first.remainder;
  }
};

// One thread a result.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    forward_kernel(const T* __restrict__ input, const T* __restrict__ weight, T* output,
                   DepthwiseShape p, bool channels_last, Strides in, int64_t count,
                   Epilogue<T> epilogue) {
  const int64_t i = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (i >= count) return;
  const Element to(i, channels_last, p.filters, p.out_height, p.out_width);
  const T* image = input + in.at(to.image, to.channel / p.multiplier);
  const T* filter = weight + int64_t(to.channel) * p.taps();
  const int top = to.y * p.stride_height - p.padding_height;
  const int left = to.x * p.stride_width - p.padding_width;
  Sum<T> sum = 0;
  for (int kh = 0; kh < p.kernel_height; ++kh) {
    const int y = top + kh * p.dilation_height;
    if (y < 0 || y >= p.height) continue;
    for (int kw = 0; kw < p.kernel_width; ++kw) {
      const int x = left + kw * p.dilation_width;
      if (x < 0 || x >= p.width) continue;
      sum = multiply_add(widen(image[y * in.y + x * in.x]), widen(filter[kh * p.kernel_width + kw]),
                         sum);
    }
  }
  output[i] = narrow<T>(epilogue(sum, to.channel));
}

// The taps of one axis that meet a coordinate of the input: the last, and how far apart they are.
// Tap k of output q is at stride * q + dilation * k, counted in the padded input.
struct Meeting {
  int last, step;

  __device__ Meeting(int coordinate, int kernel, int stride, int dilation, int step)
      : last(kernel - 1), step(step) {
    for (int i = 1; i < step && last >= 0 && (coordinate - last * dilation) % stride != 0; ++i) {
      --last;
    }
    if (last >= 0 && (coordinate - last * dilation) % stride != 0) last = -1;
  }
};

// One thread a result, from the last tap down: outputs in their order.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    grad_input_kernel(const T* __restrict__ grad_output, const T* __restrict__ weight,
                      T* grad_input, DepthwiseShape p, bool channels_last, Strides out, int step_y,
                      int step_x, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (i >= count) return;
  const Element to(i, channels_last, p.channels, p.height, p.width);
  const int y = to.y + p.padding_height, x = to.x + p.padding_width;
  const Meeting rows(y, p.kernel_height, p.stride_height, p.dilation_height, step_y);
  const Meeting columns(x, p.kernel_width, p.stride_width, p.dilation_width, step_x);
  Sum<T> sum = 0;
  for (int m = 0; m < p.multiplier; ++m) {
    const int o = to.channel * p.multiplier + m;
    const T* image = grad_output + out.at(to.image, o);
    const T* filter = weight + int64_t(o) * p.taps();
    for (int kh = rows.last; kh >= 0; kh -= rows.step) {
      const int oy = (y - kh * p.dilation_height) / p.stride_height;
      if (y < kh * p.dilation_height || oy >= p.out_height) continue;
      for (int kw = columns.last; kw >= 0; kw -= columns.step) {
        const int ox = (x - kw * p.dilation_width) / p.stride_width;
        if (x < kw * p.dilation_width || ox >= p.out_width) continue;
        sum = multiply_add(widen(image[oy * out.y + ox * out.x]),
                           widen(filter[kh * p.kernel_width + kw]), sum);
      }
    }
  }
  grad_input[i] = narrow<T>(sum);
}

// How a block's threads share a sum over pixels: 2^lane_bits side by side have neighbouring
// filters, the others ("workers") further pixels, each at most kChain of them in a part.
struct Sharing {
  static constexpr int kChain = 64;
  int lane_bits, filter_blocks;
  int64_t part_pixels, pixels;
  int step_image, step_y, step_x;  // from a worker's pixel to its next

  Sharing(const DepthwiseShape& p, Layout layout) : pixels(p.batch * p.out_size()) {
    lane_bits = layout == Layout::nchw
                    ? 0
                    : std::min(int(std::bit_width(unsigned(std::max(p.filters, 1) - 1))), 5);
    filter_blocks = int(ceil_div(p.filters, 1 << lane_bits));
    const int workers = kDepthwiseThreads >> lane_bits;
    part_pixels = workers * kChain;
    step_image = int(workers / p.out_size());
    step_y = int(workers % p.out_size() / p.out_width);
    step_x = workers % p.out_width;
  }
  int64_t parts() const { return ceil_div(pixels, part_pixels); }
};

// One tap of a block's filters, and a part of their outputs' pixels.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    grad_weight_kernel(const T* __restrict__ input, const T* __restrict__ grad_output,
                       Sum<T>* partial, DepthwiseShape p, Sharing s, Strides in, Strides out) {
  __shared__ Sum<T> sums[kDepthwiseThreads];
  const int lanes = 1 << s.lane_bits, workers = kDepthwiseThreads >> s.lane_bits;
  const int lane = threadIdx.x & (lanes - 1), worker = threadIdx.x >> s.lane_bits;
  const int taps = p.taps();
  const int tap = blockIdx.x % taps;
  const int o = (blockIdx.x / taps % s.filter_blocks << s.lane_bits) + lane;
  const int part = blockIdx.x / taps / s.filter_blocks;
  const int64_t end = part * s.part_pixels + s.part_pixels;
  const int64_t last = end < s.pixels ? end : s.pixels;
  int64_t pixel = part * s.part_pixels + worker;
  const int top = tap / p.kernel_width * p.dilation_height - p.padding_height;
  const int left = tap % p.kernel_width * p.dilation_width - p.padding_width;
  Sum<T> sum = 0;
  if (o < p.filters && pixel < last) {
    const int c = o / p.multiplier;
    Element at(pixel, false, 1, p.out_height, p.out_width);
    for (; pixel < last; pixel += workers) {
      const int y = at.y * p.stride_height + top, x = at.x * p.stride_width + left;
      if (y >= 0 && y < p.height && x >= 0 && x < p.width) {
        sum = multiply_add(widen(grad_output[out.at(at.image, o) + at.y * out.y + at.x * out.x]),
                           widen(input[in.at(at.image, c) + y * in.y + x * in.x]), sum);
      }
      at.x += s.step_x;
      at.y += s.step_y;
      at.image += s.step_image;
      if (at.x >= p.out_width) at.x -= p.out_width, ++at.y;
      if (at.y >= p.out_height) at.y -= p.out_height, ++at.image;
    }
  }
  // Over the workers, as a tree of fixed shape.
  sums[threadIdx.x] = sum;
  for (int half = kDepthwiseThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (threadIdx.x < unsigned(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (worker == 0 && o < p.filters) {
    partial[(int64_t(part) * p.filters + o) * taps + tap] = sums[threadIdx.x];
  }
}

// A block has the weights of a sector of memory. Of each weight every 32nd part is summed by one
// thread, and the threads' sums by a tree.
constexpr int kSummed = 8, kSummers = kDepthwiseThreads / kSummed;
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    sum_kernel(const Sum<T>* __restrict__ partial, T* grad_weight, int64_t size, int parts) {
  __shared__ Sum<T> sums[kSummers][kSummed];
  const int lane = threadIdx.x % kSummed, row = threadIdx.x / kSummed;
  const int64_t i = int64_t(blockIdx.x) * kSummed + lane;
  Sum<T> sum = 0;
  if (i < size) {
    for (int part = row; part < parts; part += kSummers) sum += partial[part * size + i];
  }
  sums[row][lane] = sum;
  for (int half = kSummers / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) sums[row][lane] += sums[row + half][lane];
  }
  if (row == 0 && i < size) grad_weight[i] = narrow<T>(sums[0][lane]);
}

template <class T>
void run_any(const Conv2dCall& call, Arena& arena) {
  const DepthwiseShape p(call.problem);
  const bool channels_last = call.layout == Layout::nhwc;
  const Strides in(call.layout, p.channels, p.height, p.width);
  const Strides out(call.layout, p.filters, p.out_height, p.out_width);
  const auto input = static_cast<const T*>(call.input);
  const auto weight = static_cast<const T*>(call.weight);
  const auto grad_output = static_cast<const T*>(call.grad_output);
  const auto output = static_cast<T*>(call.output);
  const dim3 block(kDepthwiseThreads);
  if (call.pass == Conv2dPass::backward_weight) {
    const Sharing s(p, call.layout);
    DepthwisePartials<T> partials{nullptr, int(s.parts()), int64_t(p.filters) * p.taps()};
    partials.sums = arena.take<Sum<T>>(s.parts() * partials.size);
    if (arena.counting()) return;
    if (s.parts() > 0) {
      launch(grad_weight_kernel<T>, dim3(s.parts() * s.filter_blocks * p.taps()), block, 0,
             call.stream, input, grad_output, partials.sums, p, s, in, out);
    }
    depthwise_sum(partials, call);
  } else if (arena.counting()) {
    return;
  } else if (call.pass == Conv2dPass::forward) {
    const int64_t count = p.batch * p.out_size() * p.filters;
    launch(forward_kernel<T>, dim3(ceil_div(count, kDepthwiseThreads)), block, 0, call.stream,
           input, weight, output, p, channels_last, in, count, Epilogue<T>(call));
  } else {
    const int64_t count = p.batch * p.in_size() * p.channels;
    launch(grad_input_kernel<T>, dim3(ceil_div(count, kDepthwiseThreads)), block, 0, call.stream,
           grad_output, weight, output, p, channels_last, out,
           p.stride_height / std::gcd(p.stride_height, p.dilation_height),
           p.stride_width / std::gcd(p.stride_width, p.dilation_width), count);
  }
}

bool is_strip(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const int64_t kernel = p.kernel_height, stride = p.stride_height;
  return call.dtype != DType::float64 && p.kernel_width == kernel && p.stride_width == stride &&
         p.dilation_height == 1 && p.dilation_width == 1 &&
         (kernel == 3 || kernel == 5 ? stride <= 2 : kernel == 7 && stride == 1);
}

// Whether the kernels for vectors of channels take the call. The sums of backward_weight are theirs
// wherever the operands begin; the others are taken in the same order by any kernel.
bool is_vector(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const int vector = depthwise_vector(int(p.kernel_height));
  if (p.out_channels != p.in_channels || p.in_channels % vector != 0) return false;
  if (call.pass == Conv2dPass::backward_weight) return true;
  for (const void* operand :
       {call.input, call.grad_output, static_cast<const void*>(call.output)}) {
    if (reinterpret_cast<uintptr_t>(operand) % (vector * size_of(call.dtype)) != 0) return false;
  }
  return true;
}

}  // namespace

template <class T>
void depthwise_sum(const DepthwisePartials<T>& partials, const Conv2dCall& call) {
  launch(sum_kernel<T>, dim3(ceil_div(partials.size, kSummed)), dim3(kDepthwiseThreads), 0,
         call.stream, partials.sums, static_cast<T*>(call.output), partials.size, partials.parts);
}
template void depthwise_sum(const DepthwisePartials<float>&, const Conv2dCall&);
template void depthwise_sum(const DepthwisePartials<double>&, const Conv2dCall&);
template void depthwise_sum(const DepthwisePartials<__half>&, const Conv2dCall&);
template void depthwise_sum(const DepthwisePartials<__nv_bfloat16>&, const Conv2dCall&);

const char* depthwise_declines(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  if (p.groups != p.in_channels) {
    return "depthwise convolution has as many groups as input channels";
  }
  // Coordinates and planes are counted by ints, and blocks by a grid's.
  constexpr int64_t kCoordinate = INT_MAX / 4, kElements = int64_t(1) << 36;
  const int64_t in_size = p.in_height * p.in_width, out_size = p.out_height() * p.out_width();
  if (p.in_height + 2 * p.padding_height > kCoordinate ||
      p.in_width + 2 * p.padding_width > kCoordinate || p.stride_height > kCoordinate ||
      p.stride_width > kCoordinate || p.batch > INT_MAX / std::max<int64_t>(p.in_channels, 1) ||
      p.batch > INT_MAX / std::max<int64_t>(p.out_channels, 1) || p.out_channels > INT_MAX / 32 ||
      std::max(p.batch, p.kernel_taps()) * std::max(p.in_channels, p.out_channels) >
          kElements / std::max<int64_t>(std::max(in_size, out_size), 1)) {
    return "depthwise convolution counts planes and pixels of a row in 32 bits";
  }
  return nullptr;
}

void conv2d_depthwise(const Conv2dCall& call, Arena& arena) {
  if (is_strip(call)) {
    if (call.layout == Layout::nchw) return conv2d_depthwise_nchw(call, arena);
    if (is_vector(call)) return conv2d_depthwise_nhwc(call, arena);
  }
  with_element_of(call.dtype, [&](auto element) { run_any<decltype(element)>(call, arena); });
}

}  // namespace convext::cuda
