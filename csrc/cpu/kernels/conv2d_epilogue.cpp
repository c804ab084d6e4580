#include "cpu/kernels/conv2d_epilogue.h"

#include <algorithm>
#include <cmath>

namespace convext::cpu {
namespace {

constexpr int64_t kSampleRows = 16;

}  // namespace

template <class T>
BlockEpilogue<T>::BlockEpilogue(const Conv2dCall& call, int64_t channels, int64_t ld,
                                int64_t blocks, const VectorKernels<T>& isa, Arena& arena)
    : asked_(call.epilogue),
      isa_(isa),
      groups_(call.problem.groups),
      channels_(channels),
      ld_(ld),
      blocks_(blocks) {
  const int64_t parameters = asked_ && asked_->maps ? groups_ * ld + kColumnPadding : 0;
  shift_ = arena.take<T>(parameters);
  scale_ = arena.take<T>(parameters);
  offset_ = arena.take<T>(parameters);
  const bool wants_moments = asked_ && asked_->sums_moments;
  moments_ = arena.take<double>(wants_moments ? blocks * 2 * groups_ * channels : 0);
  counts_ = arena.take<int64_t>(wants_moments ? blocks : 0);
}

template <class T>
BlockEpilogue<T>::Scratch::Scratch(const BlockEpilogue& epilogue, Arena& arena) {
  const bool wants_moments = epilogue.asked_ && epilogue.asked_->sums_moments;
  const int64_t columns = wants_moments ? epilogue.ld_ + kColumnPadding : 0;
  shift = arena.take<T>(columns);
  sum = arena.take<T>(columns);
  dot = arena.take<T>(columns);
  total = arena.take<double>(columns);
  total_dot = arena.take<double>(columns);
}

template <class T>
void BlockEpilogue<T>::prepare(int64_t group) {
  if (!asked_->maps) return;
  const auto lay_out = [&](const void* from, T* to) {
    const T* values = static_cast<const T*>(from) + group * channels_;
    to += group * ld_;
    std::fill(std::copy_n(values, channels_, to), to + ld_, T(0));
  };
  lay_out(asked_->shift, shift_);
  lay_out(asked_->scale, scale_);
  lay_out(asked_->offset, offset_);
}

template <class T>
void BlockEpilogue<T>::apply(int64_t group, int64_t block, T* rows, int64_t count,
                             const Scratch& scratch) const {
  if (asked_->maps) {
    const int64_t first = group * ld_;
    isa_.column_map({asked_->kind, rows, nullptr, ld_, count, ld_, shift_ + first, scale_ + first,
                     offset_ + first, nullptr, nullptr, nullptr, rows});
  }
  if (!asked_->sums_moments) return;
  double* mean = moments_ + block * 2 * groups_ * channels_ + group * channels_;
  if (group == 0) counts_[block] = count;
  add_moments(mean, mean + groups_ * channels_, rows, count, scratch);
}

// Sums about a shift that is near the block's mean lose nothing. The mean of a few rows is near
// enough; if they mislead, the mean that came out is for a second pass.
template <class T>
void BlockEpilogue<T>::add_moments(double* mean, double* deviation, const T* rows, int64_t count,
                                   const Scratch& s) const {
  const auto sums = [&](ColumnSum kind, int64_t end) {
    std::fill_n(s.total, channels_, 0.0);
    std::fill_n(s.total_dot, channels_, 0.0);
    for (int64_t row = 0; row < end; row += kFlushRows) {
      std::fill_n(s.sum, ld_, T(0));
      std::fill_n(s.dot, ld_, T(0));
      isa_.column_sums({kind, rows + row * ld_, nullptr, ld_, std::min(kFlushRows, end - row), ld_,
                        s.shift, nullptr, nullptr, s.sum, s.dot});
      for (int64_t c = 0; c < channels_; ++c) s.total[c] += s.sum[c];
      for (int64_t c = 0; c < channels_; ++c) s.total_dot[c] += s.dot[c];
    }
  };
  const int64_t few = std::min(kSampleRows, count);
  sums(ColumnSum::total, few);
  for (int64_t c = 0; c < channels_; ++c) mean[c] = s.total[c] / double(few);
  std::fill_n(s.shift, ld_, T(0));
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int64_t c = 0; c < channels_; ++c) {
      const T shift = T(mean[c]);
      s.shift[c] = std::isfinite(shift) ? shift : T(0);
    }
    sums(ColumnSum::moments, count);
    bool misled = false;
    for (int64_t c = 0; c < channels_; ++c) {
      const double error = s.total[c] / double(count);
      mean[c] = double(s.shift[c]) + error;
      const double square = s.total_dot[c] - error * s.total[c];
      deviation[c] = square < 0 ? 0 : square;
      if (error * s.total[c] > deviation[c]) misled = true;
    }
    if (!misled) break;
  }
}

// Pairwise update of means and sums of squares after Chan, Golub and LeVeque, "Algorithms for
// Computing the Sample Variance" (1983).
template <class T>
void BlockEpilogue<T>::finish() const {
  if (!asked_->sums_moments) return;
  const int64_t channels = groups_ * channels_;
  double *mean = asked_->mean, *deviation = asked_->deviation;
  std::fill_n(mean, channels, 0.0);
  std::fill_n(deviation, channels, 0.0);
  double count = 0;
  for (int64_t block = 0; block < blocks_; ++block) {
    const double added = double(counts_[block]), both = count + added;
    const double* block_mean = moments_ + block * 2 * channels;
    const double* block_deviation = block_mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = block_mean[c] - mean[c];
      mean[c] += apart * (added / both);
      deviation[c] += block_deviation[c] + apart * apart * (count * added / both);
    }
    count = both;
  }
}

template class BlockEpilogue<float>;
template class BlockEpilogue<double>;

}  // namespace convext::cpu
