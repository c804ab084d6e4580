// The device's side of a ChannelGrid: where a thread stands, and its way through the elements.
#pragma once

#include "cuda/kernels/channel_grid.h"
#include "cuda/kernels/channel_tally.h"
#include "cuda/kernels/element.h"

namespace convext::cuda {

// Of the kernels over rows a thread has V channels, of the others V elements of one channel.
template <bool kByRow, int V>
constexpr int kThreadChannels = kByRow ? V : 1;

struct ChannelPlace {
  int64_t part;
  int64_t channel;  // the thread's first
  int64_t first;    // offset of its element in item 0
  int row;
  bool inside;  // are there such channels?

  template <bool kByRow, int V>
  static __device__ __forceinline__ ChannelPlace of(const ChannelGrid& grid) {
    const int64_t block = block_number(), group = block % grid.groups;
    const int column = kByRow ? int(threadIdx.x) % grid.columns : 0;
    const int64_t channel = kByRow ? group * grid.group_distance + column * V : group;
    return {block / grid.groups, channel, group * grid.group_distance + column * V,
            kByRow ? int(threadIdx.x) / grid.columns : int(threadIdx.x), channel < grid.channels};
  }
};

// Items of a part.
__device__ __forceinline__ int64_t items_of(const ChannelGrid& grid, int64_t part) {
  const int64_t left = grid.items - part * grid.part_items;
  return left < grid.part_items ? left : grid.part_items;
}

// Calls body(at, n) for the items that the thread takes of its part, kAtOnce at a time: at[0] to
// at[n - 1] are the offsets of its elements.
template <bool kByRow, int kAtOnce, class Body>
__device__ __forceinline__ void for_items(const ChannelGrid& grid, const ChannelPlace& place,
                                          const Body& body) {
  int64_t i = place.part * grid.part_items + place.row;
  const int64_t end = place.part * grid.part_items + items_of(grid, place.part);
  if (i >= end || !place.inside) return;
  const int64_t rows = blockDim.x / (kByRow ? grid.columns : 1);
  int64_t in_run = kByRow ? 0 : i % grid.run;
  int64_t offset =
      place.first + (kByRow ? i * grid.item_distance
                            : i / grid.run * grid.run_distance + in_run * grid.item_distance);
  while (i < end) {
    int64_t at[kAtOnce];
    int n = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      at[u] = offset;
      n += i < end;
      i += rows;
      offset += grid.step;
      if constexpr (!kByRow) {
        in_run += grid.run_step;
        if (in_run < grid.run) continue;
        in_run -= grid.run;
        offset += grid.wrap;
      }
    }
    body(at, n);
  }
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// Do all of them, null or not, lie where V elements can be read at once?
template <class T, int V, class... Pointers>
bool lie_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % sizeof(Pack<T, V>) == 0) && ...);
}

// The elements of the first n items at `at`; of the others zeros.
template <class T, int V, int U>
__device__ __forceinline__ void read_items(Sum<T> (&to)[U][V], const T* from,
                                           const int64_t (&at)[U], int n, bool aligned) {
  Pack<T, V> packs[U] = {};
  if (V == 1 || aligned) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < n) packs[u] = *reinterpret_cast<const Pack<T, V>*>(from + at[u]);
    }
  } else {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (u < n) packs[u].value[v] = from[at[u] + v];
      }
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[u][v] = widen(packs[u].value[v]);
  }
}

template <class T, int V, int U>
__device__ __forceinline__ void write_items(T* to, const int64_t (&at)[U], int n, bool aligned,
                                            const Sum<T> (&from)[U][V]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (u >= n) break;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = narrow<T>(from[u][v]);
    if (V == 1 || aligned) {
      *reinterpret_cast<Pack<T, V>*>(to + at[u]) = pack;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[at[u] + v] = pack.value[v];
    }
  }
}

// Calls f with T's zero, V and whether the grid is by row, as types, of a grid for this dtype.
template <class F>
void with_items_of(DType dtype, const ChannelGrid& grid, const F& f) {
  with_element_of(dtype, [&](auto element) {
    constexpr int kVector = sizeof element == 8 ? 2 : 4;
    const auto with_vector = [&](auto vector) {
      grid.by_row ? f(element, vector, std::true_type()) : f(element, vector, std::false_type());
    };
    grid.vector == 1 ? with_vector(std::integral_constant<int, 1>())
                     : with_vector(std::integral_constant<int, kVector>());
  });
}

}  // namespace convext::cuda
