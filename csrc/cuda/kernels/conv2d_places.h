// Where the elements of a convolution's tensors lie, in the words of gemm.h.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/kernels/gemm.h"

namespace convext::cuda {

// Whether a product of sizes can be counted, twice over, in 31 bits.
inline bool fits(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product >= INT_MAX / 2) return false;
  }
  return true;
}

// Whether coordinates can, and taps, and the tiles of products of so many pixels.
inline bool fits_gemm(const Conv2dProblem& p, int64_t pixels) {
  constexpr int64_t kPad = 16, kTile = 32;  // the most that channels are padded; the smallest tile
  constexpr int64_t kMostSplits = 256;
  const int64_t channels = p.group_in_channels() + kPad, filters = p.group_out_channels() + kPad;
  if (!fits({pixels}) || !fits({channels, p.kernel_taps()}) || !fits({filters, p.kernel_taps()}) ||
      !fits({p.in_height + 2 * p.padding_height}) || !fits({p.in_width + 2 * p.padding_width})) {
    return false;
  }
  const int64_t tiles = std::max(channels, filters) * p.kernel_taps() / kTile + 1;
  return fits({p.groups, pixels / kTile + 1, tiles}) &&
         fits({p.groups, filters / kTile + 1, tiles, kMostSplits});
}

// A tensor (N, C, H, W), a group of channels at a time. A weight is one of (O, C / groups, kH, kW),
// a group of filters at a time.
struct Planes {
  const void* from;
  int64_t n, c, h, w, group;        // distances, in elements
  int64_t channels, height, width;  // channels of a group

  static Planes of(const void* from, Layout layout, int64_t channels, int64_t height, int64_t width,
                   int64_t groups) {
    const int64_t image = channels * height * width, own = channels / groups;
    if (layout == Layout::nchw) {
      return {from, image, height * width, width, 1, own * height * width, own, height, width};
    }
    return {from, image, 1, width * channels, channels, own, own, height, width};
  }
  static Planes input(const Conv2dCall& call, const void* from) {
    const Conv2dProblem& p = call.problem;
    return of(from, call.layout, p.in_channels, p.in_height, p.in_width, p.groups);
  }
  static Planes output(const Conv2dCall& call, const void* from) {
    const Conv2dProblem& p = call.problem;
    return of(from, call.layout, p.out_channels, p.out_height(), p.out_width(), p.groups);
  }
  static Planes weight(const Conv2dCall& call, const void* from) {
    const Conv2dProblem& p = call.problem;
    Planes planes =
        of(from, call.layout, p.group_in_channels(), p.kernel_height, p.kernel_width, 1);
    planes.group = p.group_out_channels() * planes.n;
    return planes;
  }

  // Whether channels lie in vectors of `wide` elements, and whether those can be read at once.
  bool vectors(int64_t wide) const {
    return c == 1 && n % wide == 0 && h % wide == 0 && w % wide == 0 && group % wide == 0 &&
           channels % wide == 0;
  }
  bool aligned() const { return reinterpret_cast<uintptr_t>(from) % 16 == 0; }
};

// Coordinates first, first + step, ... along one axis of an image.
struct Steps {
  int64_t first, step, count;
};

// Places of all combinations of `a_count` images or channels, `a` elements apart, and of rows and
// columns of the planes.
inline Axis places(const Planes& planes, int64_t a_count, int64_t a, Steps h, Steps w,
                   bool rotated) {
  Axis axis;
  axis.count = uint32_t(a_count * h.count * w.count);
  // Of an axis without elements too, which divides nothing.
  axis.middle = FastDivisor(int32_t(std::max<int64_t>(rotated ? w.count : h.count, 1)));
  axis.inner = FastDivisor(int32_t(std::max<int64_t>(rotated ? a_count : w.count, 1)));
  axis.rotated = rotated;
  axis.base = h.first * planes.h + w.first * planes.w;
  axis.a = a;
  axis.i = h.step * planes.h;
  axis.j = w.step * planes.w;
  axis.h = int32_t(h.first), axis.h_step = int32_t(h.step);
  axis.w = int32_t(w.first), axis.w_step = int32_t(w.step);
  return axis;
}

// Pixels of all images of an input that a filter's first tap meets, in the order of the output; and
// what its other taps add to that.
inline Axis corners(const Conv2dProblem& p, const Planes& input) {
  return places(input, p.batch, input.n, {-p.padding_height, p.stride_height, p.out_height()},
                {-p.padding_width, p.stride_width, p.out_width()}, false);
}
inline Axis taps(const Conv2dProblem& p, const Planes& input, bool channels_inside) {
  return places(input, input.channels, input.c, {0, p.dilation_height, p.kernel_height},
                {0, p.dilation_width, p.kernel_width}, channels_inside);
}

inline Axis all_pixels(const Planes& planes, int64_t images) {
  return places(planes, images, planes.n, {0, 1, planes.height}, {0, 1, planes.width}, false);
}
inline Axis all_taps(const Planes& weight, bool channels_inside) {
  return places(weight, weight.channels, weight.c, {0, 1, weight.height}, {0, 1, weight.width},
                channels_inside);
}

inline GemmOperand operand(const Planes& planes, const Axis& rows, const Axis& k, bool along_k,
                           bool vectors) {
  GemmOperand operand;
  operand.from = planes.from;
  operand.group = planes.group;
  operand.rows = rows, operand.k = k;
  operand.height = int32_t(planes.height), operand.width = int32_t(planes.width);
  operand.along_k = along_k;
  operand.vectors = vectors, operand.aligned = planes.aligned();
  return operand;
}

}  // namespace convext::cuda
