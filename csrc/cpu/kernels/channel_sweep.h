// One pass over a tensor (N, C, *) that treats every channel by itself: sums per channel, or a map
// with a channel's own coefficients. Batch norm, with or without a ReLU beside it, and the gradient
// of a bias are made of these.
//
// The vector code works down the columns of a matrix (see ColumnSums in isa.h), so the tensor is
// read as one whose columns each belong to one channel. Which one depends on the shape alone:
//
//   rows      a row is an image of an nchw tensor, C * pixels columns, or a pixel of an nhwc
//   tensor, C
//             columns; several such units side by side where one would not fill vectors
//   images    for many pixels: each channel of each image by itself, as rows of kImageColumns
//   pixels
#pragma once

#include <cstdint>

#include "common/batch_norm_problem.h"
#include "common/types.h"
#include "cpu/kernels/arena.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// A matrix inside the tensor; offsets and distances in elements.
struct Sheet {
  int64_t offset, ld, rows, cols;
};

// How the tensor is cut. Items are independent: a range of channels in a part ("split") of the
// batch.
class ChannelGrid {
 public:
  ChannelGrid(const BatchNormProblem&, Layout);

  int64_t ranges() const { return ranges_; }
  int64_t splits() const { return splits_; }
  int64_t items() const { return ranges_ * splits_; }

  int64_t first_channel(int64_t range) const { return range * range_channels_; }
  int64_t channels(int64_t range) const;

  // Columns of a range: copies() times all of its channels, span() adjacent columns for each.
  int64_t copies() const { return copies_; }
  int64_t span() const { return span_; }
  int64_t most_columns() const { return copies_ * range_channels_ * span_; }

  // Calls body(sheet) for every part of the item, in order. A sheet with fewer columns has the
  // first.
  template <class Body>
  void for_sheets(int64_t range, int64_t split, const Body& body) const;

  // A few rows of the range, spread over the batch.
  Sheet sample(int64_t range) const;

 private:
  int64_t batch_, channels_, pixels_;
  bool by_image_;
  int64_t copies_, span_, range_channels_, ranges_;
  int64_t unit_, rows_, rest_;  // unit: elements; rest: units after the last full row
  int64_t splits_, split_rows_;
};

// The two passes: what ColumnSums and ColumnMap do, over whole tensors. Parameters are (C); the
// ones that a kind does not use are null.
template <class T>
struct ChannelSums {
  ColumnSum kind;
  const void* a;
  const void* b;
  const T *shift, *scale, *offset;
  double* sum;
  double* dot;  // null for ColumnSum::total
};

template <class T>
struct ChannelMap {
  ColumnMapKind kind;
  const void* x;
  const void* grad;
  const T *shift, *scale, *offset, *grad_scale, *gate_scale, *gate_offset;
  void* out;
  double* sum;  // of each channel's results, or null
};

// Lays its workspace out on construction; on a counting arena nothing else may be called.
template <class T>
class ChannelSweep {
 public:
  ChannelSweep(const BatchNormProblem&, DType, Layout, const IsaKernels&, int64_t threads, Arena&);

  // Of each channel's values in `x`, the mean of a few; 0 where that is not finite. Rounded to a
  // few bits of their magnitude: digits finer than those of the values themselves would be lost in
  // the same direction by every subtraction, and that adds up.
  void sample_means(const void* x, T* mean);
  void sums(const ChannelSums<T>&);
  void map(const ChannelMap<T>&);

 private:
  struct Scratch;
  Scratch scratch(Arena&) const;
  Scratch scratch_of(int64_t slot) const;
  void expand(const T* values, int64_t range, T* columns) const;
  void flush(T* sums, int64_t range, double* totals) const;
  double* partials_of(int64_t range, int64_t split) const;
  void add_partials(double* sum, double* dot) const;
  const T* read(const void* data, const Sheet&, T* scratch) const;

  const ChannelGrid grid_;
  const VectorKernels<T>& isa_;
  const DType dtype_;
  const int64_t channels_;
  int64_t slots_, part_size_ = 0;
  double* partials_;  // [split][2][channel]
  char* parts_;       // [slot]
};

}  // namespace convext::cpu
