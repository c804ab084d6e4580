#include "cuda/kernels/moments.h"

#include "common/types.h"
#include "cuda/kernels/channel_tally.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kColumns = 8;  // channels of a block: together at least a sector of memory
constexpr int kAtOnce = 4;   // parts that a thread reads before it merges the first of them

template <class S>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const S* __restrict__ partial, int64_t part_rows, int64_t rows, int64_t channels,
                 S* __restrict__ mean, S* __restrict__ deviation) {
  using Tally = Moments<S, 1>;
  const int64_t channel = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const int64_t parts = channel < channels ? ceil_div(rows, part_rows) : 0;
  constexpr int64_t kStep = kThreads / kColumns;
  Tally all{};
  for (int64_t first = threadIdx.x / kColumns; first < parts; first += kAtOnce * kStep) {
    Tally part[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = first + i * kStep;
      if (at >= parts) continue;
      const S* from = partial + at * 2 * channels + channel;
      const int64_t left = rows - at * part_rows;
      part[i] = {S(left < part_rows ? left : part_rows), {from[0]}, {from[channels]}};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) all.merge(part[i]);
  }
  all = merge_rows(all, kColumns, dynamic_shared<S>());
  if (threadIdx.x < kColumns && channel < channels) {
    mean[channel] = all.mean[0];
    deviation[channel] = all.deviation[0];
  }
}

}  // namespace

template <class S>
void merge_moments(const S* partial, int64_t part_rows, int64_t rows, int64_t channels, S* mean,
                   S* deviation, Stream stream) {
  if (channels == 0) return;
  launch(merge_kernel<S>, dim3(ceil_div(channels, kColumns)), dim3(kThreads),
         tally_bytes<Moments<S, 1>>(kThreads), stream, partial, part_rows, rows, channels, mean,
         deviation);
}

template void merge_moments(const float*, int64_t, int64_t, int64_t, float*, float*, Stream);
template void merge_moments(const double*, int64_t, int64_t, int64_t, double*, double*, Stream);

}  // namespace convext::cuda
