#include "cpu/kernels/depthwise_axis.h"

#include <algorithm>
#include <numeric>

#include "common/types.h"

namespace convext::cpu {

DepthwiseAxis DepthwiseAxis::forward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                     int64_t padding, int64_t dilation, int64_t group,
                                     Arena& arena) {
  DepthwiseAxis axis;
  axis.target_size = out;
  axis.source_size = in;
  axis.classes = 1;
  axis.source_step = stride;
  axis.kernel_step = 1;
  axis.tap_step = dilation;
  axis.reach_ = (kernel - 1) * dilation + 1;
  axis.spans_ = arena.take<DepthwiseSpan>(out * ceil_div(kernel, group));
  if (!arena.counting()) axis.cut_groups(0, -padding, 0, kernel, group);
  return axis;
}

DepthwiseAxis DepthwiseAxis::backward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                      int64_t padding, int64_t dilation, int64_t group,
                                      Arena& arena) {
  const int64_t common = std::gcd(stride, dilation);
  DepthwiseAxis axis;
  axis.target_size = in;
  axis.source_size = out;
  axis.classes = std::max<int64_t>(1, std::min(stride, in));
  axis.source_step = 1;
  axis.kernel_step = stride / common;
  axis.tap_step = -(dilation / common);
  axis.reach_ = (kernel - 1) * dilation / stride + 2;  // of all classes together
  axis.spans_ = arena.take<DepthwiseSpan>(in * ceil_div(kernel, group));
  if (arena.counting()) return axis;
  for (int64_t residue = 0; residue < axis.classes; ++residue) {
    int64_t k = 0;
    while (k < kernel && (residue + padding - k * dilation) % stride != 0) ++k;
    axis.cut_groups(residue, (residue + padding - k * dilation) / stride, k,
                    ceil_div(kernel - k, axis.kernel_step), group);
  }
  return axis;
}

void DepthwiseAxis::cut_groups(int64_t residue, int64_t start, int64_t kernel, int64_t taps,
                               int64_t group) {
  const int64_t groups = std::max<int64_t>(1, ceil_div(taps, group));
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t first = i * taps / groups, end = (i + 1) * taps / groups;
    cut(residue, start + first * tap_step, kernel + first * kernel_step, end - first);
  }
}

// Appends the spans of a class whose target 0 meets its first of `taps` taps at source `start`.
void DepthwiseAxis::cut(int64_t residue, int64_t start, int64_t kernel, int64_t taps) {
  const int64_t step = tap_step < 0 ? -tap_step : tap_step;
  bool open = false;
  for (int64_t i = 0; residue + i * classes < target_size; ++i) {
    const int64_t at = start + i * source_step;
    // Taps to leave out because they meet something below 0, or the source's end or beyond.
    const int64_t below = at < 0 ? ceil_div(-at, step) : 0;
    const int64_t beyond = at >= source_size ? (at - source_size) / step + 1 : 0;
    int64_t first = below, end = taps;
    if (tap_step < 0) {
      first = beyond;
      end = at < 0 ? 0 : std::min(taps, at / step + 1);
    } else if (beyond) {
      end = 0;
    } else {
      end = std::min(taps, (source_size - 1 - at) / step + 1);
    }
    if (first >= end) first = end = 0;
    if (open) {
      DepthwiseSpan& last = spans_[span_count_ - 1];
      if (last.taps == end - first && last.kernel == kernel + first * kernel_step) {
        ++last.count;
        continue;
      }
    }
    open = true;
    spans_[span_count_++] = {
        residue, i, 1, kernel + first * kernel_step, end - first, at + first * tap_step};
  }
}

DepthwiseSpan DepthwiseAxis::within(const DepthwiseSpan& span, int64_t first, int64_t end) const {
  const int64_t low = std::max(span.first, first / classes);
  const int64_t in_class = end > span.residue ? ceil_div(end - span.residue, classes) : 0;
  const int64_t high = std::min(span.first + span.count, in_class);
  DepthwiseSpan part = span;
  part.first = low;
  part.count = std::max<int64_t>(0, high - low);
  part.source += (low - span.first) * source_step;
  return part;
}

int64_t DepthwiseAxis::most_sources(int64_t targets) const {
  return std::min(source_size, (ceil_div(targets, classes) - 1) * source_step + reach_);
}

DepthwiseAxis::Range DepthwiseAxis::sources(int64_t first, int64_t end) const {
  Range range{source_size, 0};
  for (int64_t i = 0; i < span_count_; ++i) {
    const DepthwiseSpan part = within(spans_[i], first, end);
    if (part.count == 0 || part.taps == 0) continue;
    const int64_t across = (part.taps - 1) * tap_step;
    const int64_t low = part.source + std::min<int64_t>(0, across);
    const int64_t high = part.source + std::max<int64_t>(0, across);
    range.first = std::min(range.first, low);
    range.end = std::max(range.end, high + (part.count - 1) * source_step + 1);
  }
  if (range.end <= range.first) return {0, 0};
  return range;
}

}  // namespace convext::cpu
