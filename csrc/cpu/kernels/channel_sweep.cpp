#include "cpu/kernels/channel_sweep.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace convext::cpu {
namespace {

// Spans of a few vectors take a rest and a sum across lanes each time; many images side by side as
// columns do without, but take parameters for each column.
constexpr int64_t kShortestSpan = 32, kShortestSpanOfMany = 256;
constexpr int64_t kManyImages = 32;
static_assert(kShortestSpan >= kSpanLanes);

// Columns of a range at most: their sums and parameters stay in the first-level cache. Fewer where
// rows of them have to be converted, or are copies.
constexpr int64_t kRangeColumns = 2048, kFewColumns = 512;
constexpr int64_t kSheetSize = 4096;  // elements; they stay there too

// What of a second-level cache a block may take, in bytes, and what it may where it is one channel.
constexpr int64_t kBlockSize = 256 * 1024;
constexpr int64_t kLargestBlock = 448 * 1024;
constexpr int64_t kShortestRun = 2048;  // bytes; shorter ones are slow to come from memory
constexpr int64_t kRun = 4096;          // elements; longer ones are none the quicker

constexpr int64_t kMostSplits = 64;
constexpr int64_t kWorthAThread = 64 * 1024;  // elements
constexpr int64_t kSampleRows = 8;
constexpr int kSampleBits = 10;

// Rows of columns that are worked on at a time, in whole chains of sums.
int64_t sheet_rows(int64_t cols) {
  const int64_t most = kSheetSize / std::max<int64_t>(1, cols) / kSumChain * kSumChain;
  return std::clamp(most, kSumChain, kFlushRows);
}

// The sum of n values, in double, in four chains.
template <class T>
double total(const T* values, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; ++j) sum[j] += values[i + j];
  }
  for (; i < n; ++i) sum[0] += values[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

double power_of_two(int64_t exponent) {
  const int64_t bits = (exponent + 1023) << 52;
  double value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A multiple of a power of two that is a small part of the standard deviation.
double round_for(double mean, double variance) {
  int exponent = 0;
  std::frexp(variance, &exponent);
  // In sums with this, the last bit is worth that power.
  const double ruler = 1.5 * power_of_two(exponent / 2 - kSampleBits + 52);
  return (mean + ruler) - ruler;
}

// A channel's values, or nothing where there are none for any channel.
template <class V>
V* from_channel(V* values, int64_t channel) {
  return values ? values + channel : nullptr;
}

}  // namespace

ChannelGrid::ChannelGrid(const BatchNormProblem& p, Layout layout, int64_t bytes, bool converts)
    : channels_(p.channels) {
  if (p.elements() == 0) return;
  const bool nchw = layout == Layout::nchw;
  by_span_ = nchw && p.pixels >= (p.batch < kManyImages ? kShortestSpan : kShortestSpanOfMany);
  span_ = nchw ? p.pixels : 1;
  const int64_t unit = channels_ * span_, units = nchw ? p.batch : p.count();
  const int64_t most_columns = converts ? kFewColumns : kRangeColumns;
  if (!by_span_) {
    // Enough copies for 32 columns and for a multiple of 16, which suits the vectors of every ISA.
    while (copies_ < 32 && unit * copies_ * 2 <= kFewColumns &&
           (unit * copies_ < 32 || unit * copies_ % 16)) {
      copies_ *= 2;
    }
  }
  ld_ = unit * copies_;
  rows_ = units / copies_;
  rest_ = units % copies_ * unit;

  const auto as_many = [&](int64_t of) {
    return copies_ > 1 ? channels_ : std::clamp<int64_t>(of, 1, channels_);
  };
  const int64_t widest = by_span_ ? channels_ : as_many(most_columns / span_);
  const int64_t channel_bytes = p.count() * bytes;
  range_channels_ = std::min(widest, as_many(kBlockSize / std::max<int64_t>(1, channel_bytes)));
  in_cache_ = bytes > 0 && channel_bytes <= kLargestBlock / range_channels_ &&
              (range_channels_ == channels_ || range_channels_ * span_ * bytes >= kShortestRun);
  split_rows_ = std::max<int64_t>(1, rows_);
  if (!in_cache_) {
    range_channels_ = by_span_ ? as_many(kRun / span_) : widest;
    const int64_t row = range_channels_ * span_ * copies_;
    split_rows_ = round_up(std::max(kWorthAThread / row, ceil_div(rows_, kMostSplits)), kSumChain);
  }
  ranges_ = ceil_div(channels_, range_channels_);
  splits_ = std::max<int64_t>(1, ceil_div(rows_, split_rows_));
}

int64_t ChannelGrid::channels(int64_t range) const {
  return std::min(range_channels_, channels_ - first_channel(range));
}

Sheet ChannelGrid::columns(int64_t offset, int64_t rows, int64_t cols) const {
  return {offset, ld_, rows, /*channel=*/0, /*spans=*/1, /*distance=*/cols, /*length=*/cols};
}

template <class Body>
void ChannelGrid::for_sheets(int64_t range, int64_t split, const Body& body) const {
  const int64_t first = split * split_rows_, end = std::min(rows_, first + split_rows_);
  const int64_t channel = first_channel(range), channel_end = channel + channels(range);
  if (by_span_) {
    const int64_t rows = span_chain_rows(span_);
    const int64_t spans = std::max<int64_t>(1, kSheetSize / (rows * span_));
    for (int64_t row = first; row < end; row += rows) {
      for (int64_t c = channel; c < channel_end; c += spans) {
        for (int64_t i = 0, length = 0; i < span_; i += length) {
          // No part of a span is shorter than its vectors are.
          length = span_ - i < kSheetSize + kSpanLanes ? span_ - i : kSheetSize;
          body(Sheet{row * ld_ + c * span_ + i, ld_, std::min(rows, end - row), c,
                     std::min(spans, channel_end - c), span_, length});
        }
      }
    }
    return;
  }
  const int64_t cols = copies_ * channels(range) * span_, rows = sheet_rows(cols);
  for (int64_t row = first; row < end; row += rows) {
    body(columns(row * ld_ + channel * span_, std::min(rows, end - row), cols));
  }
  if (rest_ && split == splits_ - 1) body(columns(rows_ * ld_, 1, rest_));
}

Sheet ChannelGrid::sample(int64_t range) const {
  const int64_t channel = first_channel(range);
  if (rows_ == 0) return columns(0, 1, rest_);
  Sheet sheet =
      columns(channel * span_, std::min(rows_, kSampleRows), copies_ * channels(range) * span_);
  sheet.ld = ld_ * std::max<int64_t>(1, rows_ / kSampleRows);
  if (by_span_) {
    sheet.channel = channel;
    sheet.spans = channels(range);
    sheet.distance = span_;
    sheet.length = kSpanLanes;
  }
  return sheet;
}

// What one thread works with.
template <class T>
struct ChannelSweep<T>::Scratch {
  T *shift, *scale, *offset, *grad_scale, *gate_scale, *gate_offset, *sum, *dot;  // [columns]
  T *a, *b, *out;             // sheets, for 16-bit tensors
  double *total, *total_dot;  // [channels of a range]
};

template <class T>
typename ChannelSweep<T>::Scratch ChannelSweep<T>::scratch(Arena& arena) const {
  const bool spans = grid_.by_span();
  const int64_t columns = spans ? grid_.most_channels() : grid_.most_columns() + kColumnPadding;
  const int64_t most = kSheetSize + (spans ? kSpanLanes : kSumChain * columns);
  const int64_t sheet = converts_ ? most : 0;
  Scratch s;
  for (T** array : {&s.shift, &s.scale, &s.offset, &s.grad_scale, &s.gate_scale, &s.gate_offset,
                    &s.sum, &s.dot}) {
    *array = arena.take<T>(columns);
  }
  s.a = arena.take<T>(sheet);
  s.b = arena.take<T>(sheet);
  s.out = arena.take<T>(sheet);
  s.total = arena.take<double>(grid_.most_channels());
  s.total_dot = arena.take<double>(grid_.most_channels());
  return s;
}

template <class T>
ChannelSweep<T>::ChannelSweep(const BatchNormProblem& p, DType dtype, Layout layout,
                              int64_t tensors, const IsaKernels& isa, int64_t threads, Arena& arena)
    : converts_(size_of(dtype) != int64_t(sizeof(T))),
      grid_(p, layout, tensors * size_of(dtype), converts_),
      isa_(isa.of<T>()),
      dtype_(dtype),
      channels_(p.channels) {
  const int64_t worth = 1 + p.elements() / kWorthAThread;
  slots_ = std::max<int64_t>(1, std::min({grid_.items(), threads, worth}));
  partials_ = arena.take<double>(grid_.in_cache() ? 0 : 2 * grid_.splits() * channels_);
  Arena one(nullptr);
  scratch(one);
  part_size_ = one.used();
  parts_ = arena.take_parts(slots_, one);
}

template <class T>
typename ChannelSweep<T>::Scratch ChannelSweep<T>::scratch_of(int64_t slot) const {
  Arena part(parts_ + slot * part_size_);
  return scratch(part);
}

// Where a sheet lies once it is converted.
template <class T>
Sheet ChannelSweep<T>::in_scratch(const Sheet& sheet) const {
  if (!converts_) return sheet;
  Sheet dense = sheet;
  dense.offset = 0;
  dense.distance = sheet.length;
  dense.ld = sheet.spans * sheet.length;
  return dense;
}

template <class T>
const T* ChannelSweep<T>::read(const void* data, const Sheet& sheet, T* scratch) const {
  if (!converts_ || !data) return data ? static_cast<const T*>(data) + sheet.offset : nullptr;
  T* to = scratch;
  const bool adjacent = sheet.distance == sheet.length;
  const int64_t runs = adjacent ? 1 : sheet.spans;
  const int64_t run = adjacent ? sheet.spans * sheet.length : sheet.length;
  for (int64_t r = 0; r < sheet.rows; ++r) {
    for (int64_t i = 0; i < runs; ++i, to += run) {
      isa_.load(dtype_, data, sheet.offset + r * sheet.ld + i * sheet.distance, to, run);
    }
  }
  return scratch;
}

// For sheets of a map: what they have of a row is adjacent.
template <class T>
void ChannelSweep<T>::write(const T* scratch, const Sheet& sheet, void* data) const {
  const int64_t run = sheet.spans * sheet.length;
  for (int64_t r = 0; r < sheet.rows; ++r) {
    isa_.store(scratch + r * run, dtype_, data, sheet.offset + r * sheet.ld, run);
  }
}

// A value for each channel of the range, laid out over its columns.
template <class T>
void ChannelSweep<T>::expand(const T* values, int64_t range, T* columns) const {
  if (!values) return;
  values += grid_.first_channel(range);
  const int64_t channels = grid_.channels(range), span = grid_.span();
  for (int64_t copy = 0; copy < grid_.copies(); ++copy) {
    if (span == 1) {
      columns = std::copy_n(values, channels, columns);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c, columns += span) std::fill_n(columns, span, values[c]);
  }
}

// Adds the columns up, channel by channel, and begins anew. The totals are the range's.
template <class T>
void ChannelSweep<T>::flush(T* sums, int64_t range, double* totals) const {
  const int64_t channels = grid_.channels(range), span = grid_.span();
  const T* column = sums;
  for (int64_t copy = 0; copy < grid_.copies(); ++copy, column += channels * span) {
    if (span == 1) {
      for (int64_t c = 0; c < channels; ++c) totals[c] += double(column[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) totals[c] += total(column + c * span, span);
    }
  }
  std::fill(sums, sums + (column - sums), T(0));
}

template <class T>
void ChannelSweep<T>::sample_range(const Scratch& s, int64_t range, const void* x, T* mean) const {
  const Sheet all = grid_.sample(range);
  const int64_t first = grid_.first_channel(range), channels = grid_.channels(range);
  std::fill_n(s.total, channels, 0.0);
  std::fill_n(s.total_dot, channels, 0.0);
  int64_t count = 0;  // of a channel's values
  if (grid_.by_span()) {
    std::fill_n(s.shift, channels, T(0));
    count = all.rows * all.length;
    const int64_t most = kSheetSize / count;
    for (int64_t c = 0; c < channels; c += most) {
      Sheet sheet = all;
      sheet.offset += c * all.distance;
      sheet.spans = std::min(most, channels - c);
      const Sheet at = in_scratch(sheet);
      isa_.span_sums({ColumnSum::moments, read(x, sheet, s.a), nullptr, at.ld, at.rows, at.spans,
                      at.distance, at.length, s.shift + c, nullptr, nullptr, s.total + c,
                      s.total_dot + c});
    }
  } else {
    count = all.rows * (all.length / channels);
    for (T* zero : {s.shift, s.sum, s.dot}) std::fill_n(zero, grid_.most_columns(), T(0));
    const Sheet at = in_scratch(all);
    isa_.column_sums({ColumnSum::moments, read(x, all, s.a), nullptr, at.ld, at.rows, at.length,
                      s.shift, nullptr, nullptr, s.sum, s.dot});
    flush(s.sum, range, s.total);
    flush(s.dot, range, s.total_dot);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const T value = T(round_for(s.total[c] / double(count), s.total_dot[c] / double(count)));
    mean[first + c] = std::isfinite(value) ? value : T(0);
  }
}

template <class T>
void ChannelSweep<T>::sum_item(const Scratch& s, int64_t range, int64_t split,
                               const ChannelSums<T>& call) const {
  const int64_t first = grid_.first_channel(range), channels = grid_.channels(range);
  std::fill_n(call.sum + first, channels, 0.0);
  if (call.dot) std::fill_n(call.dot + first, channels, 0.0);
  if (!grid_.by_span()) return sum_columns(s, range, split, call);
  grid_.for_sheets(range, split, [&](const Sheet& sheet) {
    const Sheet at = in_scratch(sheet);
    const int64_t c = sheet.channel;
    isa_.span_sums({call.kind, read(call.a, sheet, s.a), read(call.b, sheet, s.b), at.ld, at.rows,
                    at.spans, at.distance, at.length, from_channel(call.shift, c),
                    from_channel(call.scale, c), from_channel(call.offset, c), call.sum + c,
                    from_channel(call.dot, c)});
  });
}

template <class T>
void ChannelSweep<T>::sum_columns(const Scratch& s, int64_t range, int64_t split,
                                  const ChannelSums<T>& call) const {
  const int64_t first = grid_.first_channel(range);
  std::fill_n(s.sum, grid_.most_columns(), T(0));
  std::fill_n(s.dot, grid_.most_columns(), T(0));
  expand(call.shift, range, s.shift);
  expand(call.scale, range, s.scale);
  expand(call.offset, range, s.offset);
  int64_t pending = 0;  // rows summed up in T
  const auto finish = [&] {
    flush(s.sum, range, call.sum + first);
    if (call.dot) flush(s.dot, range, call.dot + first);
    pending = 0;
  };
  grid_.for_sheets(range, split, [&](const Sheet& sheet) {
    const Sheet at = in_scratch(sheet);
    isa_.column_sums({call.kind, read(call.a, sheet, s.a), read(call.b, sheet, s.b), at.ld, at.rows,
                      at.length, s.shift, s.scale, s.offset, s.sum, s.dot});
    pending += sheet.rows;
    if (pending >= kFlushRows) finish();
  });
  if (pending) finish();
}

template <class T>
void ChannelSweep<T>::map_item(const Scratch& s, int64_t range, int64_t split,
                               const ChannelMap<T>& call) const {
  if (call.sum) std::fill_n(call.sum + grid_.first_channel(range), grid_.channels(range), 0.0);
  grid_.by_span() ? map_spans(s, range, split, call) : map_columns(s, range, split, call);
}

// The sums are a second look, but at what the first-level cache holds.
template <class T>
void ChannelSweep<T>::map_spans(const Scratch& s, int64_t range, int64_t split,
                                const ChannelMap<T>& call) const {
  grid_.for_sheets(range, split, [&](const Sheet& sheet) {
    const Sheet at = in_scratch(sheet);
    const int64_t c = sheet.channel;
    T* out = converts_ ? s.out : static_cast<T*>(call.out) + sheet.offset;
    isa_.span_map({call.kind, read(call.x, sheet, s.a), read(call.grad, sheet, s.b), at.ld, at.rows,
                   at.spans, at.distance, at.length, from_channel(call.shift, c),
                   from_channel(call.scale, c), from_channel(call.offset, c),
                   from_channel(call.grad_scale, c), from_channel(call.gate_scale, c),
                   from_channel(call.gate_offset, c), out});
    if (converts_) write(out, sheet, call.out);
    if (!call.sum) return;
    isa_.span_sums({ColumnSum::total, out, nullptr, at.ld, at.rows, at.spans, at.distance,
                    at.length, nullptr, nullptr, nullptr, call.sum + c, nullptr});
  });
}

template <class T>
void ChannelSweep<T>::map_columns(const Scratch& s, int64_t range, int64_t split,
                                  const ChannelMap<T>& call) const {
  expand(call.shift, range, s.shift);
  expand(call.scale, range, s.scale);
  expand(call.offset, range, s.offset);
  expand(call.grad_scale, range, s.grad_scale);
  expand(call.gate_scale, range, s.gate_scale);
  expand(call.gate_offset, range, s.gate_offset);
  double* totals = from_channel(call.sum, grid_.first_channel(range));
  if (totals) std::fill_n(s.sum, grid_.most_columns(), T(0));
  int64_t pending = 0;  // rows summed up in T
  grid_.for_sheets(range, split, [&](const Sheet& sheet) {
    const Sheet at = in_scratch(sheet);
    T* out = converts_ ? s.out : static_cast<T*>(call.out) + sheet.offset;
    isa_.column_map({call.kind, read(call.x, sheet, s.a), read(call.grad, sheet, s.b), at.ld,
                     at.rows, at.length, s.shift, s.scale, s.offset, s.grad_scale, s.gate_scale,
                     s.gate_offset, out});
    if (converts_) write(out, sheet, call.out);
    if (!totals) return;
    isa_.column_sums({ColumnSum::total, out, nullptr, at.ld, at.rows, at.length, nullptr, nullptr,
                      nullptr, s.sum, s.dot});
    pending += sheet.rows;
    if (pending >= kFlushRows) {
      flush(s.sum, range, totals);
      pending = 0;
    }
  });
  if (pending) flush(s.sum, range, totals);
}

template <class T>
double* ChannelSweep<T>::partial_sums(int64_t split) const {
  return partials_ + 2 * split * channels_;
}

template <class T>
void ChannelSweep<T>::add_partials(double* sum, double* dot) const {
  std::fill_n(sum, channels_, 0.0);
  if (dot) std::fill_n(dot, channels_, 0.0);
  if (grid_.items() == 0) return;
  for (int64_t split = 0; split < grid_.splits(); ++split) {
    const double* part = partial_sums(split);
    for (int64_t c = 0; c < channels_; ++c) sum[c] += part[c];
    for (int64_t c = 0; dot && c < channels_; ++c) dot[c] += part[channels_ + c];
  }
}

template <class T>
int64_t ChannelSweep<T>::Block::first_channel() const {
  return range_ < 0 ? 0 : sweep_.grid_.first_channel(range_);
}

template <class T>
int64_t ChannelSweep<T>::Block::end_channel() const {
  return range_ < 0 ? sweep_.channels_ : first_channel() + sweep_.grid_.channels(range_);
}

template <class T>
void ChannelSweep<T>::Block::sample_means(const void* x, T* mean) const {
  const ChannelSweep& sweep = sweep_;
  if (range_ >= 0) return sweep.sample_range(sweep.scratch_of(slot_), range_, x, mean);
  const int64_t ranges = sweep.grid_.ranges();
  run_slots(std::min(sweep.slots_, std::max<int64_t>(1, ranges)), ranges,
            [&](int64_t slot, int64_t range) {
              sweep.sample_range(sweep.scratch_of(slot), range, x, mean);
            });
}

template <class T>
void ChannelSweep<T>::Block::sums(const ChannelSums<T>& call) const {
  const ChannelSweep& sweep = sweep_;
  if (range_ >= 0) return sweep.sum_item(sweep.scratch_of(slot_), range_, 0, call);
  const int64_t ranges = sweep.grid_.ranges();
  run_slots(sweep.slots_, sweep.grid_.items(), [&](int64_t slot, int64_t item) {
    ChannelSums<T> part = call;
    part.sum = sweep.partial_sums(item / ranges);
    part.dot = call.dot ? part.sum + sweep.channels_ : nullptr;
    sweep.sum_item(sweep.scratch_of(slot), item % ranges, item / ranges, part);
  });
  sweep.add_partials(call.sum, call.dot);
}

template <class T>
void ChannelSweep<T>::Block::map(const ChannelMap<T>& call) const {
  const ChannelSweep& sweep = sweep_;
  if (range_ >= 0) return sweep.map_item(sweep.scratch_of(slot_), range_, 0, call);
  const int64_t ranges = sweep.grid_.ranges(), items = sweep.grid_.items();
  run_slots(sweep.slots_, items, [&](int64_t slot, int64_t item) {
    // Backwards, for the cache holds what the sums were made of last.
    const int64_t begin = slot * items / sweep.slots_, end = (slot + 1) * items / sweep.slots_;
    item = begin + end - 1 - item;
    ChannelMap<T> part = call;
    if (call.sum) part.sum = sweep.partial_sums(item / ranges);
    sweep.map_item(sweep.scratch_of(slot), item % ranges, item / ranges, part);
  });
  if (call.sum) sweep.add_partials(call.sum, nullptr);
}

template class ChannelSweep<float>;
template class ChannelSweep<double>;

}  // namespace convext::cpu
