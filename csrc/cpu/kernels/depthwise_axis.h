// One spatial axis of a depthwise convolution, cut where the taps that a pixel meets change.
#pragma once

#include <cstdint>

#include "common/arena.h"

namespace convext::cpu {

// Neighbouring targets of one residue class that all meet the same taps, out of all or of a group.
struct DepthwiseSpan {
  int64_t residue, first, count;  // targets residue + i * classes, for i from first on
  int64_t kernel;                 // the first kernel position they meet
  int64_t taps;                   // how many they meet
  int64_t source;                 // where the first target meets the first of them
};

// Target i meets kernel position k at the source coordinate
//   i * stride + k * dilation - padding              going forward
//   (i + padding - k * dilation) / stride if whole   going backward
// provided that the source has one there: padding is left out. Taps are cut into equal groups of at
// most `group`, each of which has spans of its own.
class DepthwiseAxis {
 public:
  static DepthwiseAxis forward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                               int64_t padding, int64_t dilation, int64_t group, Arena& arena);
  static DepthwiseAxis backward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                int64_t padding, int64_t dilation, int64_t group, Arena& arena);

  int64_t target_size, source_size;
  int64_t classes;      // residue classes of the target coordinate; 1 going forward
  int64_t source_step;  // source distance of neighbouring targets of a class
  int64_t kernel_step;  // distance of neighbouring taps in the kernel,
  int64_t tap_step;     // and in the source

  int64_t span_count() const { return span_count_; }
  const DepthwiseSpan& span(int64_t i) const { return spans_[i]; }
  // The part of a span that lies within targets [first, end), first being a multiple of `classes`;
  // its count is 0 where there is none.
  DepthwiseSpan within(const DepthwiseSpan&, int64_t first, int64_t end) const;

  // Most sources that `targets` neighbouring targets meet.
  int64_t most_sources(int64_t targets) const;
  struct Range {
    int64_t first, end;
  };
  // The sources that targets [first, end) meet.
  Range sources(int64_t first, int64_t end) const;

 private:
  void cut_groups(int64_t residue, int64_t start, int64_t kernel, int64_t taps, int64_t group);
  void cut(int64_t residue, int64_t start, int64_t kernel, int64_t taps);

  int64_t reach_;  // sources that a target's taps span, or more
  DepthwiseSpan* spans_;
  int64_t span_count_ = 0;
};

}  // namespace convext::cpu
