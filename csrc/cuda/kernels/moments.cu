#include "cuda/kernels/moments.h"

#include "common/types.h"
#include "cuda/kernels/channel_tally.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kColumns = 8;  // channels of a block: together at least a sector of memory
constexpr int kAtOnce = 4;   // parts that a thread reads before it merges the first of them

// Merges the tallies of a channel's parts, read(part, channel), and has them written.
template <class Tally, class Read, class Write>
__device__ __forceinline__ void merge_parts(int64_t parts, int64_t channels, const Read& read,
                                            const Write& write) {
  const int64_t channel = block_number() * kColumns + threadIdx.x % kColumns;
  constexpr int64_t kStep = kThreads / kColumns;
  Tally all{};
  for (int64_t first = threadIdx.x / kColumns; first < parts; first += kAtOnce * kStep) {
    Tally some[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t part = first + i * kStep;
      if (part < parts && channel < channels) some[i] = read(part, channel);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) all.merge(some[i]);
  }
  all = merge_rows(all, kColumns, dynamic_shared<typename Tally::Value>());
  if (threadIdx.x < kColumns && channel < channels) write(channel, all);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const S* __restrict__ partial, int64_t part_rows, int64_t rows, int64_t channels,
                   S* __restrict__ mean, S* __restrict__ deviation) {
  using Tally = Moments<S, 1>;
  merge_parts<Tally>(
      ceil_div(rows, part_rows), channels,
      [&](int64_t part, int64_t channel) {
        const S* from = partial + part * 2 * channels + channel;
        const int64_t left = rows - part * part_rows;
        return Tally{S(left < part_rows ? left : part_rows), {from[0]}, {0}, {from[channels]}};
      },
      [&](int64_t channel, const Tally& all) {
        mean[channel] = all.mean[0] + all.rest[0];
        deviation[channel] = all.deviation[0];
      });
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const S* __restrict__ partial, int64_t parts, int64_t channels,
                S* __restrict__ sum) {
  merge_parts<Sums<S, 1>>(
      parts, channels,
      [&](int64_t part, int64_t channel) {
        return Sums<S, 1>{{partial[part * channels + channel]}};
      },
      [&](int64_t channel, const Sums<S, 1>& all) { sum[channel] = all.sum[0]; });
}

}  // namespace

template <class S>
void merge_moments(const S* partial, int64_t part_rows, int64_t rows, int64_t channels, S* mean,
                   S* deviation, Stream stream) {
  if (channels == 0) return;
  launch(moments_kernel<S>, grid_of(ceil_div(channels, kColumns)), dim3(kThreads),
         tally_bytes<Moments<S, 1>>(kThreads), stream, partial, part_rows, rows, channels, mean,
         deviation);
}

template <class S>
void add_parts(const S* partial, int64_t parts, int64_t channels, S* sum, Stream stream) {
  if (channels == 0) return;
  launch(sums_kernel<S>, grid_of(ceil_div(channels, kColumns)), dim3(kThreads),
         tally_bytes<Sums<S, 1>>(kThreads), stream, partial, parts, channels, sum);
}

template void merge_moments(const float*, int64_t, int64_t, int64_t, float*, float*, Stream);
template void merge_moments(const double*, int64_t, int64_t, int64_t, double*, double*, Stream);
template void add_parts(const float*, int64_t, int64_t, float*, Stream);
template void add_parts(const double*, int64_t, int64_t, double*, Stream);

}  // namespace convext::cuda
