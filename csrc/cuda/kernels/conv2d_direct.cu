// Sums products where the operands lie, one thread a result. Takes every problem.
#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/element.h"
#include "cuda/kernels/epilogue.h"

namespace convext::cuda {
namespace {

// Distances between neighbours along each axis, in elements.
struct Strides {
  int64_t n, c, h, w;

  static Strides of(Layout layout, int64_t channels, int64_t height, int64_t width) {
    const int64_t image = channels * height * width;
    if (layout == Layout::nchw) return {image, height * width, width, 1};
    return {image, 1, width * channels, channels};
  }
};

template <class T>
__global__ void __launch_bounds__(256)
    forward_kernel(const T* input, const T* weight, T* output, Conv2dProblem p, Strides in,
                   Strides filter, Strides out, Epilogue<T> epilogue, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t x = i % p.out_width(), y = i / p.out_width() % p.out_height();
  const int64_t o = i / (p.out_width() * p.out_height()) % p.out_channels;
  const int64_t n = i / (p.out_width() * p.out_height() * p.out_channels);
  const int64_t channels = p.group_in_channels();
  const int64_t first = o / p.group_out_channels() * channels;
  Sum<T> sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t kh = 0; kh < p.kernel_height; ++kh) {
      const int64_t h = y * p.stride_height - p.padding_height + kh * p.dilation_height;
      if (h < 0 || h >= p.in_height) continue;
      for (int64_t kw = 0; kw < p.kernel_width; ++kw) {
        const int64_t w = x * p.stride_width - p.padding_width + kw * p.dilation_width;
        if (w < 0 || w >= p.in_width) continue;
        sum = multiply_add(
            widen(input[n * in.n + (first + c) * in.c + h * in.h + w * in.w]),
            widen(weight[o * filter.n + c * filter.c + kh * filter.h + kw * filter.w]), sum);
      }
    }
  }
  output[n * out.n + o * out.c + y * out.h + x * out.w] = narrow<T>(epilogue(sum, o));
}

template <class T>
void forward(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  const int64_t count = p.out_pixels() * p.out_channels;
  launch(forward_kernel<T>, dim3(ceil_div(count, 256)), dim3(256), 0, call.stream,
         static_cast<const T*>(call.input), static_cast<const T*>(call.weight),
         static_cast<T*>(call.output), p,
         Strides::of(call.layout, p.in_channels, p.in_height, p.in_width),
         Strides::of(call.layout, p.group_in_channels(), p.kernel_height, p.kernel_width),
         Strides::of(call.layout, p.out_channels, p.out_height(), p.out_width()), Epilogue<T>(call),
         count);
}

}  // namespace

void conv2d_direct(const Conv2dCall& call, Arena& arena) {
  if (arena.counting()) return;
  with_element_of(call.dtype, [&](auto element) { forward<decltype(element)>(call); });
}

}  // namespace convext::cuda
