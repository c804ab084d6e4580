// Passes over a tensor (N, C, *) that treat every channel by itself: sums per channel, or a map
// with a channel's own coefficients. Batch norm, with or without a ReLU beside it, and the gradient
// of a bias are made of these.
//
// The vector code works on the rows of a matrix whose columns each belong to one channel. Which
// matrix that is depends on the shape alone:
//
//   spans     a row is an image of an nchw tensor, and a channel's pixels in it are a span of
//             columns that share their parameters (SpanSums, SpanMap in isa.h)
//   columns   the same where the spans are short beside the vectors, or a row is a pixel of an
//             nhwc tensor, C columns: parameters are laid out for each column (ColumnSums,
//             ColumnMap); several such rows side by side where one would not fill vectors
//
// What batch norm takes two passes for is read from memory once where the cache holds a part of the
// channels: the second pass over that part comes before the first over the next.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/batch_norm_problem.h"
#include "common/types.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/slots.h"

namespace convext::cpu {

// A part of the matrix that the vector code is called for; offset and distances in elements.
struct Sheet {
  int64_t offset, ld, rows;
  int64_t channel, spans, distance, length;  // the first channel; of columns, one span of them all
};

// How the tensor is cut. Items are independent: a range of channels in a part ("split") of the
// batch.
class ChannelGrid {
 public:
  // `bytes` is what an element takes in all tensors that a block is to find in the cache.
  ChannelGrid(const BatchNormProblem&, Layout, int64_t bytes, bool converts);

  int64_t ranges() const { return ranges_; }
  int64_t splits() const { return splits_; }
  int64_t items() const { return ranges_ * splits_; }
  // Does a range by itself fit in the cache?
  bool in_cache() const { return in_cache_; }

  int64_t first_channel(int64_t range) const { return range * range_channels_; }
  int64_t channels(int64_t range) const;
  int64_t most_channels() const { return range_channels_; }

  // Are there spans? Otherwise a range has copies() times all of its channels as columns, span()
  // adjacent ones for each.
  bool by_span() const { return by_span_; }
  int64_t copies() const { return copies_; }
  int64_t span() const { return span_; }
  int64_t most_columns() const { return copies_ * range_channels_ * span_; }

  // Calls body(sheet) for every part of the item, in order, about kSheetSize elements each. A sheet
  // of columns with fewer of them has the first.
  template <class Body>
  void for_sheets(int64_t range, int64_t split, const Body& body) const;

  // A few rows of the range, spread over the batch.
  Sheet sample(int64_t range) const;

 private:
  Sheet columns(int64_t offset, int64_t rows, int64_t cols) const;

  int64_t channels_;
  bool by_span_ = false, in_cache_ = false;
  int64_t copies_ = 1, span_ = 1, range_channels_ = 1, ranges_ = 0;
  int64_t ld_ = 0, rows_ = 0, rest_ = 0;  // rest: columns of one more row
  int64_t splits_ = 1, split_rows_ = 1;
};

// What ColumnSums and ColumnMap do, over whole tensors. Parameters are (C); the ones that a kind
// does not use are null.
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
  // `tensors` is how many of the problem's are read more than once.
  ChannelSweep(const BatchNormProblem&, DType, Layout, int64_t tensors, const IsaKernels&,
               int64_t threads, Arena&);

  // Channels whose passes follow one another: a range that the cache holds, with one thread to
  // itself, or all of them.
  class Block {
   public:
    int64_t first_channel() const;
    int64_t end_channel() const;

    // Of each channel's values in `x`, the mean of a few; 0 where that is not finite. Rounded to a
    // few bits of their magnitude: digits finer than those of the values themselves would be lost
    // in the same direction by every subtraction, and that adds up.
    void sample_means(const void* x, T* mean) const;
    void sums(const ChannelSums<T>&) const;
    void map(const ChannelMap<T>&) const;

   private:
    friend class ChannelSweep;
    const ChannelSweep& sweep_;
    int64_t range_;  // or -1 for all
    int64_t slot_;
    Block(const ChannelSweep& sweep, int64_t range, int64_t slot)
        : sweep_(sweep), range_(range), slot_(slot) {}
  };

  // Calls body(block) for every block, on any threads.
  template <class Body>
  void for_blocks(const Body& body) const {
    if (!grid_.in_cache()) return body(Block(*this, -1, 0));
    run_slots(slots_, grid_.ranges(),
              [&](int64_t slot, int64_t range) { body(Block(*this, range, slot)); });
  }

 private:
  struct Scratch;
  Scratch scratch(Arena&) const;
  Scratch scratch_of(int64_t slot) const;
  Sheet in_scratch(const Sheet&) const;
  const T* read(const void* data, const Sheet&, T* scratch) const;
  void write(const T* scratch, const Sheet&, void* data) const;
  void expand(const T* values, int64_t range, T* columns) const;
  void flush(T* sums, int64_t range, double* totals) const;

  void sample_range(const Scratch&, int64_t range, const void* x, T* mean) const;
  // call.sum and call.dot are set in the range's channels.
  void sum_item(const Scratch&, int64_t range, int64_t split, const ChannelSums<T>& call) const;
  void sum_columns(const Scratch&, int64_t range, int64_t split, const ChannelSums<T>& call) const;
  void map_item(const Scratch&, int64_t range, int64_t split, const ChannelMap<T>& call) const;
  void map_columns(const Scratch&, int64_t range, int64_t split, const ChannelMap<T>& call) const;
  void map_spans(const Scratch&, int64_t range, int64_t split, const ChannelMap<T>& call) const;
  double* partial_sums(int64_t split) const;
  void add_partials(double* sum, double* dot) const;

  const bool converts_;  // from 16 bits
  const ChannelGrid grid_;
  const VectorKernels<T>& isa_;
  const DType dtype_;
  const int64_t channels_;
  int64_t slots_, part_size_ = 0;
  double* partials_;  // [split][2][channel], sums and dots
  char* parts_;       // [slot]
};

}  // namespace convext::cpu
