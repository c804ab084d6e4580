// How a tensor (N, C, *) is cut for kernels that treat every channel by itself.
//
// A block of threads works on a group of channels in a part of the batch. Its threads stand in rows
// of `columns`; a row takes one item at a time, every thread V elements of it that lie side by
// side:
//
//   spans   a group is a channel of an nchw tensor, an item V of its pixels; there is one column
//   rows    the channels lie innermost: an item is what a group's channels are in a pixel, and a
//           column has V channels
//
// Where one part is the whole batch, a block finds a group's sums and does with them what they are
// for; otherwise blocks of a second kernel first put the parts' sums together, each for itself.
#pragma once

#include <cstdint>

#include "common/batch_norm_problem.h"
#include "common/types.h"

namespace convext::cuda {

// A warp reads up to 16 bytes a thread, and 8 of a 16-bit type, so that planes of 14x14 fit.
constexpr int vector_of(DType dtype) {
  return dtype == DType::float64 ? 2 : 4;
}

struct ChannelGrid {
  // Follows from shape, dtype and layout. Without sums nothing is gained by a group in one part.
  ChannelGrid(const BatchNormProblem&, DType, Layout, bool sums);

  int64_t channels, count;  // count: values of a channel
  bool by_row;
  int vector;            // V
  int columns, threads;  // powers of two; a block's threads
  int64_t groups, parts;
  int64_t items, part_items;  // of a group; the last part has what is left

  // Element offsets. Item i of a group lies at group * group_distance + column * V +
  // i / run * run_distance + i % run * item_distance.
  int64_t group_distance, item_distance, run, run_distance;
  // From a thread's item to its next one, that of a row threads / columns further on: run_step
  // items further in the run and `step` further away; over the run's end, where run_step wraps,
  // `wrap` more.
  int64_t run_step, step, wrap;
};

}  // namespace convext::cuda
