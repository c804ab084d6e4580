// What the files of the depthwise convolution share: sizes as ints, strips, and the sum of
// partials.
//
// A filter sees one channel, so that a pass moves more memory than it computes: each kernel reads
// its operands once from memory and takes what it needs again from shared memory, the L1 cache or
// registers. A thread computes a strip: results below each other in one column, of one channel or
// of a vector of channels. Neighbouring threads have neighbouring columns where the planes lie one
// after the other (nchw), neighbouring channels where the channels do (nhwc).
#pragma once

#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/element.h"

namespace convext::cuda {

// The sizes of a depthwise problem, which has been found to fit: any sum of coordinates is an int,
// and so is any number of planes. Offsets in a tensor are not.
struct DepthwiseShape {
  explicit DepthwiseShape(const Conv2dProblem& p)
      : batch(int(p.batch)),
        channels(int(p.in_channels)),
        filters(int(p.out_channels)),
        multiplier(int(p.group_out_channels())),
        height(int(p.in_height)),
        width(int(p.in_width)),
        out_height(int(p.out_height())),
        out_width(int(p.out_width())),
        kernel_height(int(p.kernel_height)),
        kernel_width(int(p.kernel_width)),
        stride_height(int(p.stride_height)),
        stride_width(int(p.stride_width)),
        padding_height(int(p.padding_height)),
        padding_width(int(p.padding_width)),
        dilation_height(int(p.dilation_height)),
        dilation_width(int(p.dilation_width)) {}

  // Of one plane.
  __host__ __device__ int64_t in_size() const { return int64_t(height) * width; }
  __host__ __device__ int64_t out_size() const { return int64_t(out_height) * out_width; }
  __host__ __device__ int taps() const { return kernel_height * kernel_width; }

  int batch, channels, filters, multiplier;  // filters = channels * multiplier
  int height, width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width;
  int padding_height, padding_width, dilation_height, dilation_width;
};

constexpr int kDepthwiseThreads = 256;

// By value: of a constant, std::min would want the address.
constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}

// Filters' sums over parts of the pixels, [part][filter][tap]; null while counting. Adds them up.
template <class T>
struct DepthwisePartials {
  Sum<T>* sums;
  int parts;
  int64_t size;  // of a part: filters * taps
};
template <class T>
void depthwise_sum(const DepthwisePartials<T>&, const Conv2dCall&);

// conv2d_depthwise_nchw.cu, conv2d_depthwise_nhwc.cu: square kernels of 3, 5 or 7 without dilation,
// of stride 1 or (but for 7) 2, of any type but float64; in nhwc one filter a channel, and whole
// vectors of channels.
void conv2d_depthwise_nchw(const Conv2dCall&, Arena&);
void conv2d_depthwise_nhwc(const Conv2dCall&, Arena&);

// Channels of a thread in nhwc: as many as its registers can hold a filter of each.
constexpr int depthwise_vector(int kernel) {
  return kernel == 3 ? 4 : kernel == 5 ? 2 : 1;
}

// Calls f with the element type and with the kernel's size and stride as constants.
template <int kValue>
using Constant = std::integral_constant<int, kValue>;
template <class F>
void with_depthwise_strip(const Conv2dCall& call, F&& f) {
  const auto with_kernel = [&](auto element) {
    const bool strided = call.problem.stride_height == 2;
    switch (call.problem.kernel_height) {
      case 3:
        return strided ? f(element, Constant<3>(), Constant<2>())
                       : f(element, Constant<3>(), Constant<1>());
      case 5:
        return strided ? f(element, Constant<5>(), Constant<2>())
                       : f(element, Constant<5>(), Constant<1>());
      default:
        return f(element, Constant<7>(), Constant<1>());
    }
  };
  switch (call.dtype) {
    case DType::float16:
      return with_kernel(__half());
    case DType::bfloat16:
      return with_kernel(__nv_bfloat16());
    default:
      return with_kernel(float());
  }
}

// --------------------------------------------------------------------------------------------------
// a = quotient * b + remainder, for a below 2^31 by the division of 32 bits, which is much faster.

struct Quotient {
  int64_t quotient;
  int remainder;
};
__device__ __forceinline__ Quotient divide(int64_t a, int b) {
  if (a >> 31 == 0) return {int64_t(uint32_t(a) / uint32_t(b)), int(uint32_t(a) % uint32_t(b))};
  return {a / b, int(a % b)};
}

// --------------------------------------------------------------------------------------------------
// Strips. Rows and columns count from the first that the strip meets; padding is zeros.

// Sums of neighbouring channels.
template <class S, int kCount>
struct Lanes {
  S of[kCount];

  __device__ __forceinline__ static Lanes zero() {
    Lanes lanes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) lanes.of[i] = 0;
    return lanes;
  }
  __device__ __forceinline__ void add_product(const Lanes& a, const Lanes& b) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] = multiply_add(a.of[i], b.of[i], of[i]);
  }
};

// sum[i] += filter * source, with source(row, column) under the i-th result at row i * kStride.
template <int kKernel, int kStride, int kStrip, class V, class Source>
__device__ __forceinline__ void forward_strip(V (&sum)[kStrip],
                                              const V (&filter)[kKernel * kKernel],
                                              const Source& source) {
#pragma unroll
  for (int row = 0; row < (kStrip - 1) * kStride + kKernel; ++row) {
    V values[kKernel];
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) values[kw] = source(row, kw);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int kh = row - i * kStride;
      if (kh < 0 || kh >= kKernel) continue;
#pragma unroll
      for (int kw = 0; kw < kKernel; ++kw)
        sum[i].add_product(values[kw], filter[kh * kKernel + kw]);
    }
  }
}

// Results that one step of the gradient's pixels reaches: kStride * kStride pixels of the input,
// where coordinate stride * q + r, counted in the padded input, meets the taps r, r + stride, ...,
// which came from the outputs q, q - 1, ... So nothing is multiplied that is not in the sum.
// source(row, column) counts from output (q - kReach, q - kReach) of the strip's first q.
template <int kStride, int kStrip, class V>
__device__ __forceinline__ void clear(V (&sum)[kStrip][kStride][kStride]) {
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
#pragma unroll
    for (int y = 0; y < kStride; ++y) {
#pragma unroll
      for (int x = 0; x < kStride; ++x) sum[i][y][x] = V::zero();
    }
  }
}
template <int kKernel, int kStride>
constexpr int kReach = (kKernel + kStride - 1) / kStride - 1;
template <int kKernel, int kStride, int kStrip, class V, class Source>
__device__ __forceinline__ void grad_input_strip(V (&sum)[kStrip][kStride][kStride],
                                                 const V (&filter)[kKernel * kKernel],
                                                 const Source& source) {
  constexpr int reach = kReach<kKernel, kStride>;
#pragma unroll
  for (int row = 0; row < kStrip + reach; ++row) {
    V values[reach + 1];
#pragma unroll
    for (int column = 0; column <= reach; ++column) values[column] = source(row, column);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int back = i + reach - row;
      if (back < 0 || back > reach) continue;
#pragma unroll
      for (int y = 0; y < kStride; ++y) {
#pragma unroll
        for (int x = 0; x < kStride; ++x) {
#pragma unroll
          for (int column = 0; column <= reach; ++column) {
            const int kh = kStride * back + y, kw = kStride * (reach - column) + x;
            if (kh >= kKernel || kw >= kKernel) continue;
            sum[i][y][x].add_product(values[column], filter[kh * kKernel + kw]);
          }
        }
      }
    }
  }
}

// sum[tap] += source * gradient[i], for the first `count` i.
template <int kKernel, int kStride, int kStrip, class V, class Source>
__device__ __forceinline__ void grad_weight_strip(V (&sum)[kKernel * kKernel],
                                                  const V (&gradient)[kStrip], int count,
                                                  const Source& source) {
#pragma unroll
  for (int row = 0; row < (kStrip - 1) * kStride + kKernel; ++row) {
    V values[kKernel];
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) values[kw] = source(row, kw);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int kh = row - i * kStride;
      if (kh < 0 || kh >= kKernel || i >= count) continue;
#pragma unroll
      for (int kw = 0; kw < kKernel; ++kw)
        sum[kh * kKernel + kw].add_product(values[kw], gradient[i]);
    }
  }
}

}  // namespace convext::cuda
