// Matrix products whose operands need not lie in memory as matrices: where element (row, k) of an
// operand lies is a sum of a part for the row and a part for k, and so it is for the convolution
// matrix, which therefore need not be written out.
#pragma once

#include <climits>
#include <cstdint>

#include "common/arena.h"
#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/element.h"
#include "cuda/kernels/fast_divisor.h"

namespace convext::cuda {

// What a row, or a k, adds to an element's place: an offset in elements, and a row and a column of
// the image. Outside of the image elements are zeros.
struct alignas(16) Place {
  int64_t offset;
  int32_t h, w;
};

// An h that no other can bring into an image, nor two of them together.
constexpr int32_t kNowhere = -(1 << 30);

// Places of the indices 0 to count, in three digits: index = (d0 * middle + d1) * inner + d2. They
// are (a, i, j), or (i, j, a) where rotated: a counts images or channels, i and j go along the
// height and width of an image.
struct Axis {
  uint32_t count = 0;
  FastDivisor middle, inner;
  bool rotated = false;
  int32_t a_end = INT_MAX;  // of a, at most; what is above is nowhere
  int64_t base = 0, a = 0, i = 0, j = 0;
  int32_t h = 0, h_step = 0, w = 0, w_step = 0;

  // Element `index` lies at index * stride.
  static constexpr Axis line(int64_t count, int64_t stride) {
    Axis axis;
    axis.count = uint32_t(count);
    axis.a = stride;
    return axis;
  }

  __device__ Place at(uint32_t index) const {
    if (index >= count) return {0, kNowhere, 0};
    const auto [upper, d2] = inner.divide(int32_t(index));
    const auto [d0, d1] = middle.divide(upper);
    const int32_t at_a = rotated ? d2 : d0, at_i = rotated ? d0 : d1, at_j = rotated ? d1 : d2;
    return {base + at_a * a + at_i * i + at_j * j, at_a < a_end ? h + at_i * h_step : kNowhere,
            w + at_j * w_step};
  }
};

__device__ inline bool inside(const Place& a, const Place& b, int32_t height, int32_t width) {
  return uint32_t(a.h + b.h) < uint32_t(height) && uint32_t(a.w + b.w) < uint32_t(width);
}

// One side of a product. `along_k` tells in which direction neighbours lie close in memory, which
// matters to speed alone; `vectors`, that in this direction, from any multiple of kVector<T> on, so
// many lie side by side and are in the image all or none; `aligned`, that they do so at addresses
// from which a vector can be read at once.
struct GemmOperand {
  const void* from = nullptr;
  int64_t group = 0;  // from one group to the next, in elements
  Axis rows, k;
  int32_t height = 1, width = 1;
  bool along_k = true, vectors = false, aligned = false;

  __device__ bool holds(const Place& row, const Place& at_k) const {
    return inside(row, at_k, height, width);
  }
};

// Elements of a vector of 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

struct GemmOutput {
  void* to = nullptr;
  int64_t group = 0;
  Axis rows, columns;
  int32_t height = 1, width = 1;  // outside of which nothing is stored
  // Whether the four, or kVector<T>, elements of a row, or a column, from a multiple of that on lie
  // side by side at an aligned address.
  bool vectors_of_columns = false, vectors_of_rows = false;
  bool along_rows = false;  // whether neighbours are rows

  __device__ bool holds(const Place& row, const Place& column) const {
    return inside(row, column, height, width);
  }
};

// out[m][n] = sum over k of a[m][k] * b[n][k], in every group.
struct Gemm {
  uint32_t m, n, k, groups;
  GemmOperand a, b;
  GemmOutput out;
  // Null, or where sums go instead of `out`, without epilogue: [split][group][m][n], of Sum<T>.
  void* sums = nullptr;
  // Null, or where the moments of what comes out of the epilogue go: [tile of rows][mean, sum of
  // squared deviations][channel], of Sum<T>. Then there is one split.
  void* moments = nullptr;

  // How the work is cut. Of a split's k's there are a multiple of every tile's.
  bool large_tiles = false;
  uint32_t tiles_m = 0, tiles_n = 0, splits = 1, split_k = 0;

  __device__ __host__ int64_t elements() const { return int64_t(groups) * m * n; }
};

// Which instructions multiply.
enum class GemmUnit { simt, tensor_cores };

// Of a call's factors: tensor cores where device and dtype have them and precision allows.
inline GemmUnit gemm_unit(const Conv2dCall& call) {
  const bool tensor_cores = call.dtype == DType::bfloat16 || call.dtype == DType::float16 ||
                            (call.dtype == DType::float32 && call.tf32);
  return tensor_cores && call.compute_capability >= 80 ? GemmUnit::tensor_cores : GemmUnit::simt;
}

// Cuts the work into tiles and splits, by its shape alone; `most_splits` of 1 forbids to split.
void cut(Gemm&, DType, GemmUnit, int64_t most_splits = INT_MAX);

// Sums that the splits of a cut product need room for.
inline int64_t split_sums(const Gemm& g) {
  return g.splits > 1 ? g.splits * g.elements() : 0;
}

// Rows of a tile of a product that is cut.
int64_t tile_rows(const Gemm&, GemmUnit);

// Multiplies what cut() has cut for this unit; tensor cores want operands in vectors. Epilogue and
// stream are those of the call, and its dtype that of the operands. Where there is more than one
// split, `sums` is set, and add_splits() follows.
void multiply(const Gemm&, const Conv2dCall& call, GemmUnit);

// Sums [group][m][n] that outlive a product: the splits are added to them, or replace them if they
// are the first, and go to the output where they are the last.
struct Carried {
  void* sums = nullptr;
  bool first = true, last = true;
};
// The splits' sums, added in order, to the output.
void add_splits(const Gemm&, const Conv2dCall& call, Carried carried = {});

// Both, with room for split_sums().
void multiply_and_add(Gemm, const Conv2dCall& call, GemmUnit, void* sums);

// to[group][row][k], of `length` k's a row, is the operand's element, zero beyond its axes.
void write_matrix(const GemmOperand&, DType, uint32_t rows, uint32_t length, uint32_t groups,
                  void* to, Stream);

void write_zeros(void* to, int64_t bytes, Stream);

// gemm_simt.cu
template <class T>
void multiply_simt(const Gemm&, const Conv2dCall& call);

// gemm_half.cu, gemm_bfloat16.cu, gemm_tf32.cu: needs sm_80, operands in vectors.
template <class T>
void multiply_mma(const Gemm&, const Conv2dCall& call);

}  // namespace convext::cuda
