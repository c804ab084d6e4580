// How an output pixel finds the source elements it sums, for all three passes at once.
//
// A convolution reads, for output pixel p and tap t, the source element at (place of p) + (offset
// of t): both are offsets into a zero-padded copy of a part of the source, the slab. With the two
// lists of offsets in hand,
//   forward          out[p][o]     = sum over t of slab[p + t] * weight[t][o]
//   backward_weight  grad[t][o]    = sum over p of slab[p + t] * grad_output[p][o]
//   backward_input   is a forward with grad_output as its source, once per residue class of the
//   stride:
//                    pixels whose coordinates are equal modulo the stride meet the same taps.
// `direct` multiplies through the lists; `im2col` writes slab[p + t] out as the matrix it is.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/types.h"
#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// How a slab lies in memory: as the source does, or, for nchw, with the positions that are equal
// modulo the source's step side by side, so that the elements which neighbouring targets meet at
// one tap are neighbours.
enum class Slab { as_source, by_phase };

// Which kernel positions a gather lists: small images have some that meet nothing but padding.
enum class Taps { all, needed };

// One spatial axis of a gather. Target i and kernel position k meet the source at
//   i * stride + k * dilation - padding              going forward, from input to output
//   (i + padding - k * dilation) / stride if whole   going backward, from grad_output to grad_input
// Both are q * source_step + a position that depends on k and on the residue class of i alone, with
// q the number of i within its class.
struct GatherAxis {
  int64_t source_size, target_size, kernel, stride, padding, dilation;
  bool transposed;      // going backward
  Taps listed;          // which taps count
  int64_t classes;      // residue classes of the target coordinate; 1 unless transposed
  int64_t source_step;  // source distance of neighbouring targets of one class
  int64_t origin = 0;   // source coordinate of slab position 0 of a block that starts at target 0
  int64_t reach = 1;    // slab positions that the taps of one target span
  bool meets_all = false;  // one class of targets, which meets every kernel position

  static GatherAxis forward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                            int64_t padding, int64_t dilation, Taps listed);
  static GatherAxis backward(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                             int64_t padding, int64_t dilation);

  // Slab offset at which targets of a class meet kernel position k, or -1 when that is not listed.
  int64_t tap(int64_t k, int64_t residue) const;
  // Targets of a class among the first `count` targets.
  int64_t class_count(int64_t count, int64_t residue) const {
    return count > residue ? ceil_div(count - residue, classes) : 0;
  }
  // Slab positions that a block of `count` targets needs.
  int64_t slab_size(int64_t count) const {
    return (class_count(count, 0) - 1) * source_step + reach;
  }
  // Source coordinate of slab position 0 for a block that starts at a multiple of `classes`.
  int64_t slab_start(int64_t first) const { return first / classes * source_step + origin; }
  // Whether no block of targets needs a position outside the source.
  bool inside() const {
    return origin >= 0 && slab_start(0) + slab_size(target_size) <= source_size;
  }

 private:
  // Whether targets of a class meet kernel position k, and where the first of them does.
  bool meets(int64_t k, int64_t residue, int64_t* position) const;
  void span_taps();  // sets origin, reach and meets_all
};

constexpr int64_t kSlabPadding = 64;  // elements

// Some images, or some rows of one image, of the gather's target.
struct Block {
  int64_t first_image, images, first_row, rows;
};

// How the targets are cut into blocks, which bounds the workspace. Whole images make scatters of
// different blocks disjoint; large blocks, of more rows or images, repeat less at their borders and
// leave fewer lanes idle at their ends where lanes are pixels.
enum class Cut { rows, large, whole_images };

template <class T>
class Gather {
 public:
  // Keeps its lists in the arena: they follow from the shapes alone. `channels` is the number of
  // source channels of one group: the geometry is the same for every group.
  Gather(const ImageTensor& source, int64_t channels, GatherAxis y, GatherAxis x, Cut cut,
         Slab slab, Arena& arena);

  // Where the source's elements are; until this is said there is only geometry.
  void read_from(const void* data) { source_.data = data; }

  int64_t block_count() const { return blocks_across_ * blocks_down_; }
  Block block(int64_t index) const;
  int64_t pixels(const Block& b) const { return b.images * b.rows * x_.target_size; }
  int64_t most_rows() const { return block_rows_; }
  int64_t most_pixels() const { return block_images_ * block_rows_ * x_.target_size; }

  int64_t classes() const { return y_.classes * x_.classes; }
  // Whether all targets meet every tap, so that taps and weights come in the same order. Not so for
  // a single class of a stride above 1, where the target is one pixel wide.
  bool meets_every_tap() const { return y_.meets_all && x_.meets_all; }

  // Taps of a class, in the order channel, kernel row, kernel column: slab offsets, and the index
  // (channel * kH + row) * kW + column of the weight that each meets.
  int64_t tap_total() const { return channels_ * y_.kernel * x_.kernel; }
  int64_t tap_start(int64_t residue) const { return tap_start_[residue]; }
  int64_t tap_count(int64_t residue) const { return tap_start_[residue + 1] - tap_start_[residue]; }
  const int64_t* taps(int64_t residue) const { return taps_ + tap_start_[residue]; }
  const int64_t* tap_weights(int64_t residue) const { return tap_weights_ + tap_start_[residue]; }

  // Pixels of a class within a block, in the order image, row, column: slab offsets, and indices
  // among the block's pixels.
  int64_t pixel_count(const Block& b, int64_t residue) const;
  // Of one image.
  int64_t pixel_rows(const Block& b, int64_t residue) const {
    return y_.class_count(b.rows, residue / x_.classes);
  }
  int64_t pixel_columns(int64_t residue) const {
    return x_.class_count(x_.target_size, residue % x_.classes);
  }
  const int64_t* pixel_sources(int64_t residue) const {
    return pixel_sources_ + pixel_start_[residue];
  }
  const int64_t* pixel_targets(int64_t residue) const {
    return pixel_targets_ + pixel_start_[residue];
  }

  // Elements of a slab; 0 when blocks are read in place. Past its end there is room for a vector.
  int64_t slab_size() const { return in_place_ ? 0 : block_images_ * stride_n_ + kSlabPadding; }
  bool in_place() const { return in_place_; }
  // Slab distances of images, and with Slab::by_phase of the sources of two rows of targets; those
  // of neighbours in a row are neighbours.
  int64_t image_stride() const { return stride_n_; }
  int64_t row_pitch() const { return row_step_; }
  int64_t row_classes() const { return y_.classes; }
  int64_t column_classes() const { return x_.classes; }
  // The slab of a block and of the channels from `first_channel` on: the source itself where
  // nothing needs padding or conversion, else a copy made in `slab`. With `refill` the slab was
  // filled before, for a block as high and with no fewer images.
  const T* fill(const VectorKernels<T>& isa, const Block& b, int64_t first_channel, T* slab,
                bool refill) const;
  // Whether every block has the same padding, so that one slab can be filled again.
  bool refillable() const { return block_rows_ == y_.target_size; }
  // The transpose of fill: writes the unpadded part of a slab to a tensor of the source's shape.
  void unfill(const VectorKernels<T>& isa, const Block& b, int64_t first_channel, const T* slab,
              void* data) const;

 private:
  void choose_blocks(Cut cut);
  // Whether vectors over neighbouring targets end with the last block of an image: past it nothing
  // of the source may be read.
  bool fits_whole_vectors() const;
  void list_taps(Arena& arena);
  void list_pixels(Arena& arena);

  ImageTensor source_;
  int64_t channels_;
  GatherAxis y_, x_;
  bool in_place_;
  bool transposed_;  // the slab holds planes, the source rows of channels
  int64_t block_images_, block_rows_, blocks_across_, blocks_down_;
  int64_t stride_n_, stride_c_, stride_h_, stride_w_;  // of the slab
  int64_t slab_height_, slab_width_;
  PhasedAxis row_, column_;         // where a position is in a plane; one phase but for by_phase
  int64_t row_step_, column_step_;  // slab distances of the sources of neighbouring targets
  int64_t *tap_start_, *taps_, *tap_weights_;
  int64_t *pixel_start_, *pixel_sources_, *pixel_targets_;
};

}  // namespace convext::cpu
