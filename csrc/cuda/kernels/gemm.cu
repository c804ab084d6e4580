// What surrounds the main loops of a matrix product: how it is cut, the sum of its splits, and the
// writing out of an operand as a matrix.
#include "cuda/kernels/gemm.h"

#include <algorithm>

#include "cuda/kernels/gemm_output.h"

namespace convext::cuda {
namespace {

struct TileSize {
  int64_t m, n;
};

// As in gemm_simt.cu and gemm_mma.h.
constexpr TileSize tile_size(GemmUnit unit, bool large) {
  if (unit == GemmUnit::simt) return large ? TileSize{128, 64} : TileSize{64, 32};
  return large ? TileSize{128, 128} : TileSize{64, 64};
}

int64_t blocks(const Gemm& g, TileSize tile) {
  return ceil_div(g.m, tile.m) * ceil_div(g.n, tile.n) * g.groups;
}

void cut_tiles(Gemm& g, DType dtype, GemmUnit unit) {
  // Large tiles read less for each product, but they must be enough for every multiprocessor (an
  // A100 has 108, an H200 132) and not much emptier than small ones.
  const TileSize large = tile_size(unit, true), small = tile_size(unit, false);
  const int64_t in_large = blocks(g, large) * large.m * large.n;
  const int64_t in_small = blocks(g, small) * small.m * small.n;
  g.large_tiles = blocks(g, large) >= 128 && in_large <= in_small + in_small / 4;
  if (unit == GemmUnit::simt && dtype != DType::float32) g.large_tiles = false;
  const TileSize tile = g.large_tiles ? large : small;
  g.tiles_m = uint32_t(ceil_div(g.m, tile.m));
  g.tiles_n = uint32_t(ceil_div(g.n, tile.n));
}

template <class T>
__global__ void __launch_bounds__(256)
    add_splits_kernel(const Gemm g, const Epilogue<T> epilogue, const Carried carried) {
  const int64_t count = g.elements(), i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Sum<T>* sums = static_cast<const Sum<T>*>(g.sums) + i;
  Sum<T>* const carry = static_cast<Sum<T>*>(carried.sums);
  Sum<T> sum = carry && !carried.first ? carry[i] : Sum<T>(0);
  for (uint32_t split = 0; split < g.splits; ++split) sum += sums[split * count];
  if (!carried.last) {
    carry[i] = sum;
    return;
  }
  Gemm stored = g;
  stored.sums = nullptr;
  const uint32_t n = uint32_t(i % g.n), m = uint32_t(i / g.n % g.m),
                 group = uint32_t(i / g.n / g.m);
  GemmWriter<T>(stored, epilogue, group, 0).store(m, n, sum);
}

// A tile of 32 x 32 elements is read along the direction in which they lie close, and written along
// k.
constexpr int kSide = 32, kAtATime = 8;

template <class T>
__global__ void __launch_bounds__(kSide* kAtATime)
    write_matrix_kernel(const GemmOperand operand, uint32_t rows, uint32_t length, uint32_t tiles_k,
                        uint32_t tiles_rows, T* to) {
  T(&tile)[kSide][kSide + 1] = *dynamic_shared<T[kSide][kSide + 1]>();
  const uint32_t group = blockIdx.x / tiles_k / tiles_rows;
  const uint32_t row0 = blockIdx.x / tiles_k % tiles_rows * kSide,
                 k0 = blockIdx.x % tiles_k * kSide;
  const int along = threadIdx.x % kSide, across = threadIdx.x / kSide;
  const T* from = static_cast<const T*>(operand.from) + group * operand.group;
  const Place own = operand.along_k ? operand.k.at(k0 + along) : operand.rows.at(row0 + along);
  for (int i = across; i < kSide; i += kAtATime) {
    const Place other = operand.along_k ? operand.rows.at(row0 + i) : operand.k.at(k0 + i);
    T element = narrow<T>(0);
    if (operand.holds(own, other)) element = from[own.offset + other.offset];
    (operand.along_k ? tile[i][along] : tile[along][i]) = element;
  }
  __syncthreads();
  for (int i = across; i < kSide; i += kAtATime) {
    if (row0 + i < rows && k0 + along < length) {
      to[(int64_t(group) * rows + row0 + i) * length + k0 + along] = tile[i][along];
    }
  }
}

// The same where elements lie along k in vectors.
template <class T>
__global__ void __launch_bounds__(256)
    write_vectors_kernel(const GemmOperand operand, uint32_t rows, uint32_t length, int64_t count,
                         T* to) {
  using V = Vector<T, kVector<T>>;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t line = length / kVector<T>;
  const int64_t row_of_group = i / line;
  const Place at_k = operand.k.at(uint32_t(i % line) * kVector<T>);
  const Place row = operand.rows.at(uint32_t(row_of_group % rows));
  V vector;
  for (int e = 0; e < kVector<T>; ++e) vector.of[e] = narrow<T>(0);
  if (operand.holds(row, at_k)) {
    vector =
        *reinterpret_cast<const V*>(static_cast<const T*>(operand.from) +
                                    row_of_group / rows * operand.group + row.offset + at_k.offset);
  }
  reinterpret_cast<V*>(to)[i] = vector;
}

__global__ void __launch_bounds__(256) write_zeros_kernel(char* to, int64_t bytes) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 16;
  if (i + 16 <= bytes && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<Vector<float, 4>*>(to + i) = {};
  } else {
    for (int64_t at = i; at < i + 16 && at < bytes; ++at) to[at] = 0;
  }
}

}  // namespace

void cut(Gemm& g, DType dtype, GemmUnit unit, int64_t most_splits) {
  cut_tiles(g, dtype, unit);
  const int64_t tiles = int64_t(g.tiles_m) * g.tiles_n * g.groups;
  // Splits give work to multiprocessors that have none, but a split of few products is all
  // overhead. 8192 products bound a chain of sums, which tensor cores round towards zero, as long
  // as the sums take no more than 64 MiB.
  int64_t splits = tiles < 128 ? std::min(ceil_div(256, tiles), int64_t(g.k) / 256) : 1;
  const int64_t most_sums = (int64_t(64) << 20) / (dtype == DType::float64 ? 8 : 4);
  if (g.elements() > 0) {
    splits = std::max(splits, std::min(ceil_div(g.k, 8192), most_sums / g.elements()));
  }
  splits = std::max<int64_t>(std::min(splits, most_splits), 1);
  constexpr int64_t kMultiple = 64;  // of the depth of any tile
  g.split_k = uint32_t(round_up(ceil_div(g.k, splits), kMultiple));
  g.splits = g.k > 0 ? uint32_t(ceil_div(g.k, g.split_k)) : 1;
}

int64_t tile_rows(const Gemm& g, GemmUnit unit) {
  return tile_size(unit, g.large_tiles).m;
}

void multiply(const Gemm& g, const Conv2dCall& call, GemmUnit unit) {
  with_element_of(call.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      if (unit == GemmUnit::tensor_cores) return multiply_mma<T>(g, call);
    }
    multiply_simt<T>(g, call);
  });
}

void add_splits(const Gemm& g, const Conv2dCall& call, Carried carried) {
  with_element_of(call.dtype, [&](auto element) {
    using T = decltype(element);
    launch(add_splits_kernel<T>, dim3(ceil_div(g.elements(), 256)), dim3(256), 0, call.stream, g,
           Epilogue<T>(call), carried);
  });
}

void multiply_and_add(Gemm g, const Conv2dCall& call, GemmUnit unit, void* sums) {
  if (g.splits > 1) g.sums = sums;
  multiply(g, call, unit);
  if (g.splits > 1) add_splits(g, call);
}

void write_matrix(const GemmOperand& operand, DType dtype, uint32_t rows, uint32_t length,
                  uint32_t groups, void* to, Stream stream) {
  if (rows == 0 || length == 0) return;
  with_element_of(dtype, [&](auto element) {
    using T = decltype(element);
    if (operand.vectors && operand.aligned && operand.along_k && length % kVector<T> == 0) {
      const int64_t count = int64_t(groups) * rows * (length / kVector<T>);
      launch(write_vectors_kernel<T>, dim3(ceil_div(count, 256)), dim3(256), 0, stream, operand,
             rows, length, count, static_cast<T*>(to));
    } else {
      const int64_t tiles_k = ceil_div(length, kSide), tiles_rows = ceil_div(rows, kSide);
      launch(write_matrix_kernel<T>, dim3(groups * tiles_k * tiles_rows), dim3(kSide * kAtATime),
             sizeof(T[kSide][kSide + 1]), stream, operand, rows, length, uint32_t(tiles_k),
             uint32_t(tiles_rows), static_cast<T*>(to));
    }
  });
}

void write_zeros(void* to, int64_t bytes, Stream stream) {
  launch(write_zeros_kernel, dim3(ceil_div(ceil_div(bytes, 16), 256)), dim3(256), 0, stream,
         static_cast<char*>(to), bytes);
}

}  // namespace convext::cuda
