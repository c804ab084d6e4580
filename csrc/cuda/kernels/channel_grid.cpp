#include "cuda/kernels/channel_grid.h"

#include <algorithm>
#include <bit>

namespace convext::cuda {
namespace {

// Small blocks fill a device's registers better, large ones a tensor's few channels.
constexpr int64_t kLeastThreads = 64, kManyBlocksThreads = 256, kFewBlocksThreads = 512;
constexpr int64_t kMostColumns = 32;
constexpr int64_t kSector = 32;  // bytes, the least that memory is read by

// Values that one block can sum up in less time than a second kernel takes to start.
constexpr int64_t kOnePart = 1 << 15;
// Else a part has at least so many, and there are no more blocks than a large device holds at once.
constexpr int64_t kPart = 1 << 13;
constexpr int64_t kEnoughBlocks = 528;
// Groups that keep a large device busy in one part each.
constexpr int64_t kEnoughGroups = 256;

int64_t power_of_two(int64_t at_least) {
  return int64_t(std::bit_ceil(uint64_t(at_least)));
}

}  // namespace

ChannelGrid::ChannelGrid(const BatchNormProblem& p, DType dtype, Layout layout, bool sums)
    : channels(p.channels), count(p.count()) {
  by_row = (layout == Layout::nhwc || p.pixels == 1) && channels > 1;
  // Images of one channel are one image.
  const int64_t pixels = channels == 1 ? count : p.pixels;
  const int64_t side_by_side = by_row ? channels : pixels;
  vector = side_by_side % vector_of(dtype) == 0 ? vector_of(dtype) : 1;
  if (by_row) {
    const int64_t wide = std::min(kMostColumns, power_of_two(channels / vector));
    // Narrow groups are more blocks. Where one part does, the tensor is small, and a cache's lines
    // that several blocks share do not matter.
    const int64_t narrow = std::min(wide, kSector / (vector * size_of(dtype)));
    columns = int(sums && count * narrow * vector <= kOnePart ? narrow : wide);
    groups = ceil_div(channels, columns * vector);
    group_distance = columns * vector;
    items = count;
    item_distance = channels;
    run = std::max<int64_t>(1, items);
    run_distance = run * item_distance;
  } else {
    columns = 1;
    groups = channels;
    group_distance = pixels;
    run = std::max<int64_t>(1, pixels / vector);
    items = count / vector;
    item_distance = vector;
    run_distance = channels * pixels;
  }

  const int64_t values = items * columns * vector;
  parts = 1;
  if (!sums || (values > kOnePart && groups < kEnoughGroups)) {
    parts =
        std::min(ceil_div(values, kPart), ceil_div(kEnoughBlocks, std::max<int64_t>(1, groups)));
    parts = std::max<int64_t>(1, parts);
  }
  part_items = std::max<int64_t>(1, ceil_div(items, parts));
  parts = std::max<int64_t>(1, ceil_div(items, part_items));

  constexpr int64_t kItemsOfThread = 4;
  const bool few = parts == 1 && groups < kEnoughGroups;
  threads = int(std::clamp(power_of_two(ceil_div(part_items * columns, kItemsOfThread)),
                           kLeastThreads, few ? kFewBlocksThreads : kManyBlocksThreads));
  const int64_t rows = threads / columns;
  run_step = rows % run;
  step = rows / run * run_distance + run_step * item_distance;
  wrap = run_distance - run * item_distance;
}

}  // namespace convext::cuda
