#include "cpu/kernels/channel_sweep.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/slots.h"

namespace convext::cpu {
namespace {

constexpr int64_t kImageColumns = 64;
constexpr int64_t kRangeColumns = 512;  // a few rows of them stay in the first-level cache
constexpr int64_t kMostSplits = 64;
constexpr int64_t kSplitRows = 256;   // least rows of a split
constexpr int64_t kPieceSize = 4096;  // elements
constexpr int64_t kSampleRows = 8;
constexpr int kSampleBits = 10;
constexpr int64_t kWorthAThread = 64 * 1024;  // elements

// Rows that are worked on at a time: as many as the first-level cache holds, in whole chains of
// sums.
int64_t piece_rows(int64_t cols) {
  const int64_t most = kPieceSize / std::max<int64_t>(1, cols) / kSumChain * kSumChain;
  return std::clamp(most, kSumChain, kFlushRows);
}

// Calls body(piece) for the sheet in pieces.
template <class Body>
void for_pieces(const Sheet& sheet, const Body& body) {
  const int64_t most = piece_rows(sheet.cols);
  for (int64_t row = 0; row < sheet.rows; row += most) {
    body(Sheet{sheet.offset + row * sheet.ld, sheet.ld, std::min(most, sheet.rows - row),
               sheet.cols});
  }
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

}  // namespace

ChannelGrid::ChannelGrid(const BatchNormProblem& p, Layout layout)
    : batch_(p.batch), channels_(p.channels), pixels_(p.pixels), copies_(1), rest_(0) {
  const bool nchw = layout == Layout::nchw;
  // Images side by side make long columns; a few images with many pixels would make short ones.
  by_image_ = nchw && (pixels_ > kRangeColumns || (pixels_ >= 2 * kImageColumns && batch_ < 32));
  if (by_image_) {
    span_ = kImageColumns;
    unit_ = channels_ * pixels_;
    rows_ = batch_;
    range_channels_ = 1;
    split_rows_ = std::max<int64_t>(1, ceil_div(rows_, kMostSplits));
  } else {
    span_ = nchw ? std::max<int64_t>(1, pixels_) : 1;
    unit_ = channels_ * span_;
    const int64_t units = nchw ? batch_ : p.count();
    // Enough copies for 32 columns and for a multiple of 16, which suits the vectors of every ISA.
    while (copies_ < 32 && unit_ * copies_ * 2 <= kRangeColumns &&
           (unit_ * copies_ < 32 || unit_ * copies_ % 16)) {
      copies_ *= 2;
    }
    rows_ = units / copies_;
    rest_ = units % copies_;
    range_channels_ = copies_ > 1 ? channels_
                                  : std::clamp<int64_t>(kRangeColumns / span_, 1,
                                                        std::max<int64_t>(1, channels_));
    split_rows_ = round_up(std::max<int64_t>(1, ceil_div(rows_, kMostSplits)), kSplitRows);
  }
  ranges_ = p.elements() ? ceil_div(channels_, range_channels_) : 0;
  splits_ = std::max<int64_t>(1, ceil_div(rows_, split_rows_));
}

int64_t ChannelGrid::channels(int64_t range) const {
  return std::min(range_channels_, channels_ - first_channel(range));
}

template <class Body>
void ChannelGrid::for_sheets(int64_t range, int64_t split, const Body& body) const {
  const int64_t first = split * split_rows_, end = std::min(rows_, first + split_rows_);
  const int64_t channel = first_channel(range);
  if (by_image_) {
    const int64_t rest = pixels_ % span_;
    for (int64_t n = first; n < end; ++n) {
      const int64_t offset = n * unit_ + channel * pixels_;
      body(Sheet{offset, span_, pixels_ / span_, span_});
      if (rest) body(Sheet{offset + pixels_ - rest, span_, 1, rest});
    }
    return;
  }
  const int64_t ld = copies_ * unit_;
  if (end > first) {
    body(Sheet{first * ld + channel * span_, ld, end - first, copies_ * channels(range) * span_});
  }
  if (rest_ && split == splits_ - 1) body(Sheet{rows_ * ld, ld, 1, rest_ * unit_});
}

Sheet ChannelGrid::sample(int64_t range) const {
  if (rows_ == 0) return {0, unit_, 1, rest_ * unit_};
  const int64_t ld = by_image_ ? unit_ : copies_ * unit_;
  const int64_t columns = copies_ * channels(range) * span_;
  return {first_channel(range) * (by_image_ ? pixels_ : span_),
          ld * std::max<int64_t>(1, rows_ / kSampleRows), std::min(rows_, kSampleRows), columns};
}

// What one thread works with.
template <class T>
struct ChannelSweep<T>::Scratch {
  T *shift, *scale, *offset, *grad_scale, *gate_scale, *gate_offset, *sum, *dot;  // [columns]
  T *a, *b, *out;  // pieces, for 16-bit tensors
};

template <class T>
typename ChannelSweep<T>::Scratch ChannelSweep<T>::scratch(Arena& arena) const {
  const int64_t columns = round_up(grid_.most_columns(), kColumnPadding) + kColumnPadding;
  const bool converts = size_of(dtype_) != int64_t(sizeof(T));
  const int64_t piece = converts ? kPieceSize + kSumChain * columns : 0;
  Scratch s;
  for (T** array : {&s.shift, &s.scale, &s.offset, &s.grad_scale, &s.gate_scale, &s.gate_offset,
                    &s.sum, &s.dot}) {
    *array = arena.take<T>(columns);
  }
  s.a = arena.take<T>(piece);
  s.b = arena.take<T>(piece);
  s.out = arena.take<T>(piece);
  return s;
}

template <class T>
ChannelSweep<T>::ChannelSweep(const BatchNormProblem& p, DType dtype, Layout layout,
                              const IsaKernels& isa, int64_t threads, Arena& arena)
    : grid_(p, layout), isa_(isa.of<T>()), dtype_(dtype), channels_(p.channels) {
  const int64_t worth = 1 + p.elements() / kWorthAThread;
  slots_ = std::max<int64_t>(1, std::min({grid_.items(), threads, worth}));
  partials_ = arena.take<double>(2 * grid_.splits() * channels_);
  Arena part(nullptr);
  scratch(part);
  part_size_ = part.used();
  parts_ = arena.take_parts(slots_, part);
}

template <class T>
typename ChannelSweep<T>::Scratch ChannelSweep<T>::scratch_of(int64_t slot) const {
  Arena own(parts_ + slot * part_size_);
  return scratch(own);
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

// Adds the columns up, channel by channel, and begins anew.
template <class T>
void ChannelSweep<T>::flush(T* sums, int64_t range, double* totals) const {
  const int64_t channels = grid_.channels(range), span = grid_.span();
  const T* column = sums;
  for (int64_t copy = 0; copy < grid_.copies(); ++copy) {
    for (int64_t c = 0; c < channels; ++c, column += span) {
      totals[c] += span == 1 ? double(*column) : total(column, span);
    }
  }
  std::fill(sums, sums + (column - sums), T(0));
}

// The piece as T, densely where it had to be converted.
template <class T>
const T* ChannelSweep<T>::read(const void* data, const Sheet& piece, T* scratch) const {
  if (size_of(dtype_) == int64_t(sizeof(T))) return static_cast<const T*>(data) + piece.offset;
  if (piece.ld == piece.cols) {
    isa_.load(dtype_, data, piece.offset, scratch, piece.rows * piece.cols);
  } else {
    for (int64_t r = 0; r < piece.rows; ++r) {
      isa_.load(dtype_, data, piece.offset + r * piece.ld, scratch + r * piece.cols, piece.cols);
    }
  }
  return scratch;
}

template <class T>
void ChannelSweep<T>::sample_means(const void* x, T* mean) {
  const bool converts = size_of(dtype_) != int64_t(sizeof(T));
  run_slots(std::min(slots_, grid_.ranges()), grid_.ranges(), [&](int64_t slot, int64_t range) {
    const Scratch s = scratch_of(slot);
    const Sheet sheet = grid_.sample(range);
    for (T* zero : {s.shift, s.sum, s.dot}) std::fill_n(zero, grid_.most_columns(), T(0));
    isa_.column_sums({ColumnSum::moments, read(x, sheet, s.a), nullptr,
                      converts ? sheet.cols : sheet.ld, sheet.rows, sheet.cols, s.shift, nullptr,
                      nullptr, s.sum, s.dot});
    const int64_t channels = grid_.channels(range);
    double* sum = partials_ + grid_.first_channel(range);
    double* square = sum + channels_;
    std::fill_n(sum, channels, 0.0);
    std::fill_n(square, channels, 0.0);
    flush(s.sum, range, sum);
    flush(s.dot, range, square);
    const double count = double(sheet.rows * (sheet.cols / channels));
    for (int64_t c = 0; c < channels; ++c) {
      int exponent = 0;
      std::frexp(std::sqrt(square[c] / count), &exponent);
      const double unit = std::ldexp(1.0, exponent - kSampleBits);
      const T value = T(std::nearbyint(sum[c] / count / unit) * unit);
      mean[grid_.first_channel(range) + c] = std::isfinite(value) ? value : T(0);
    }
  });
}

// Of a split: [2][channel], sums and dots, from the range's first channel on, set to zero.
template <class T>
double* ChannelSweep<T>::partials_of(int64_t range, int64_t split) const {
  double* totals = partials_ + 2 * split * channels_ + grid_.first_channel(range);
  std::fill_n(totals, grid_.channels(range), 0.0);
  std::fill_n(totals + channels_, grid_.channels(range), 0.0);
  return totals;
}

template <class T>
void ChannelSweep<T>::add_partials(double* sum, double* dot) const {
  for (int64_t c = 0; c < channels_; ++c) {
    sum[c] = 0;
    if (dot) dot[c] = 0;
  }
  if (grid_.items() == 0) return;
  for (int64_t split = 0; split < grid_.splits(); ++split) {
    const double* part = partials_ + 2 * split * channels_;
    for (int64_t c = 0; c < channels_; ++c) sum[c] += part[c];
    for (int64_t c = 0; dot && c < channels_; ++c) dot[c] += part[channels_ + c];
  }
}

template <class T>
void ChannelSweep<T>::sums(const ChannelSums<T>& call) {
  const bool converts = size_of(dtype_) != int64_t(sizeof(T));
  run_slots(slots_, grid_.items(), [&](int64_t slot, int64_t item) {
    const int64_t range = item % grid_.ranges(), split = item / grid_.ranges();
    const Scratch s = scratch_of(slot);
    double* totals = partials_of(range, split);
    std::fill_n(s.sum, grid_.most_columns(), T(0));
    std::fill_n(s.dot, grid_.most_columns(), T(0));
    expand(call.shift, range, s.shift);
    expand(call.scale, range, s.scale);
    expand(call.offset, range, s.offset);
    int64_t pending = 0;  // rows summed up in T
    const auto finish = [&] {
      flush(s.sum, range, totals);
      if (call.dot) flush(s.dot, range, totals + channels_);
      pending = 0;
    };
    grid_.for_sheets(range, split, [&](const Sheet& sheet) {
      for_pieces(sheet, [&](const Sheet& piece) {
        const T* left = read(call.a, piece, s.a);
        const T* right = call.b ? read(call.b, piece, s.b) : nullptr;
        isa_.column_sums({call.kind, left, right, converts ? piece.cols : piece.ld, piece.rows,
                          piece.cols, s.shift, s.scale, s.offset, s.sum, s.dot});
        pending += piece.rows;
        if (pending >= kFlushRows) finish();
      });
    });
    if (pending) finish();
  });
  add_partials(call.sum, call.dot);
}

template <class T>
void ChannelSweep<T>::map(const ChannelMap<T>& call) {
  const bool converts = size_of(dtype_) != int64_t(sizeof(T));
  run_slots(slots_, grid_.items(), [&](int64_t slot, int64_t item) {
    const int64_t range = item % grid_.ranges(), split = item / grid_.ranges();
    const Scratch s = scratch_of(slot);
    double* totals = nullptr;
    if (call.sum) {
      totals = partials_of(range, split);
      std::fill_n(s.sum, grid_.most_columns(), T(0));
    }
    expand(call.shift, range, s.shift);
    expand(call.scale, range, s.scale);
    expand(call.offset, range, s.offset);
    expand(call.grad_scale, range, s.grad_scale);
    expand(call.gate_scale, range, s.gate_scale);
    expand(call.gate_offset, range, s.gate_offset);
    int64_t pending = 0;  // rows summed up in T
    grid_.for_sheets(range, split, [&](const Sheet& sheet) {
      for_pieces(sheet, [&](const Sheet& piece) {
        const T* left = read(call.x, piece, s.a);
        const T* right = call.grad ? read(call.grad, piece, s.b) : nullptr;
        T* target = converts ? s.out : static_cast<T*>(call.out) + piece.offset;
        const int64_t ld = converts ? piece.cols : piece.ld;
        isa_.column_map({call.kind, left, right, ld, piece.rows, piece.cols, s.shift, s.scale,
                         s.offset, s.grad_scale, s.gate_scale, s.gate_offset, target});
        for (int64_t r = 0; converts && r < piece.rows; ++r) {
          isa_.store(s.out + r * piece.cols, dtype_, call.out, piece.offset + r * piece.ld,
                     piece.cols);
        }
        if (!call.sum) return;
        // A second look, but at what the first-level cache holds.
        isa_.column_sums({ColumnSum::total, target, nullptr, ld, piece.rows, piece.cols, nullptr,
                          nullptr, nullptr, s.sum, s.dot});
        pending += piece.rows;
        if (pending >= kFlushRows) {
          flush(s.sum, range, totals);
          pending = 0;
        }
      });
    });
    if (pending) flush(s.sum, range, totals);
  });
  if (call.sum) add_partials(call.sum, nullptr);
}

template class ChannelSweep<float>;
template class ChannelSweep<double>;

}  // namespace convext::cpu
