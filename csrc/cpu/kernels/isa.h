// What each instruction set provides: one table of small vector kernels, one file per ISA that
// fills it, and the choice among them, made once when the library is loaded.
//
// A new ISA: simd_NAME.h (the vector type), isa_NAME.cpp (a few lines), one line in isa.cpp.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace convext::cpu {

// Every long sum is cut into chains, which are then added up: the error of one chain of n terms
// grows with n, that of chains of sqrt(n) terms with sqrt(n). The cut depends on n alone, so that
// the order of a sum, and with it every bit, is the same on every ISA.
constexpr int64_t kSumChain = 16;    // of values added up
constexpr int64_t kTapChain = 64;    // of products over taps, at least
constexpr int64_t kPixelChain = 32;  // of products over a block's pixels, at least

// Rows of columns that may be summed up in T before their sums go into ones in double.
constexpr int64_t kFlushRows = 64;

// The equal parts, at most `most` long, that a sum of n terms is cut into.
inline int64_t chain_length(int64_t n, int64_t most) {
  return n <= most ? n : ceil_div(n, ceil_div(n, most));
}

// Of products over taps, of which there may be many thousand: about sqrt(n) terms.
inline int64_t tap_chain(int64_t n) {
  int64_t most = kTapChain;
  while (most * most < n) most += kTapChain;
  return chain_length(n, most);
}

// Of products over a block's pixels, a few hundred, whose sums are added up block after block.
inline int64_t pixel_chain(int64_t n) {
  return chain_length(n, n / 4 < kPixelChain ? kPixelChain : n / 4);
}

// A block of a matrix product neither of whose operands is laid out as a matrix: the left one's
// element (row, t) is source[rows[row] + taps[t]], the right one's row t starts at
// panel[panel_rows[t] * ld_panel].
//
//   out[out_rows[row] * ld_out + lane] =
//       init + sum over t of source[rows[row] + taps[t]] * panel[panel_rows[t] * ld_panel + lane]
//
// A sum runs in the order of t, in chains of fused multiply-adds that are added up in out. The
// first chain starts from init and replaces what out held; with `accumulate` it is added to that
// too. A sum may be cut into several calls at multiples of its chain.
template <class T>
struct GatherTile {
  const T* source;
  const int64_t* rows;
  const int64_t* taps;
  int64_t tap_count;
  int64_t chain;  // of the whole sum
  const T* panel;
  const int64_t* panel_rows;  // or null for 0, 1, 2, ..., which is faster
  int64_t ld_panel;
  const T* init;      // [vectors * lanes], or null
  const T* row_init;  // [row_count], or null; zeros where both are
  T* out;
  const int64_t* out_rows;  // places of the rows in out, or null for 0, 1, 2, ...
  int64_t ld_out;           // elements between places
  int row_count;
  int vectors;  // 1 to most_vectors
  bool accumulate;
};

// A block of a matrix product of operands in memory:
//
//   out[r * ld_out + lane] (+)= sum over k of a[r * a_row_stride + k * a_k_stride] *
//   b[k * ld_b + lane]
//
// in one chain of fused multiply-adds. One of a's strides is 1.
template <class T>
struct Multiply {
  const T* a;
  int64_t a_row_stride, a_k_stride;
  const T* b;
  int64_t ld_b;
  int64_t k;
  T* out;
  int64_t ld_out;
  int64_t rows;
  int vectors;  // of lanes: 1 or 2
  bool accumulate;
  // What the next product reads: asked for from further away than the second-level cache, a line at
  // each step.
  const T* ahead;
};

// What is done to tiles in a Winograd convolution F(size x size, 3x3), X being a tile of some
// channels and the matrices those of winograd_tiles.h.
//
//   input         B^T X B    (size + 2)^2 pixels to as many planes
//   output        A^T X A    planes to size^2 pixels, plus a bias
//   output_grad   A X A^T    pixels to planes
//   filter        G X G^T    9 planes to (size + 2)^2
//   filter_grad   G^T X G    and back
enum class WinogradMap { input, output, output_grad, filter, filter_grad };

// Where tiles lie: pixels of images by a list of pointers, [tile][pixel]; planes by strides.
template <class T>
struct WinogradSide {
  T* const* pixels;
  T* planes;
  int64_t plane_stride, tile_stride;
};

template <class T>
struct WinogradTiles {
  WinogradMap map;
  int size;  // 2 or 4
  WinogradSide<const T> from;
  WinogradSide<T> to;
  const T* bias;  // with room for a vector more, or null
  // Columns, which are channels. Planes, but not pixels, have room for whole vectors of them.
  int64_t count, cols;
  int row;  // the one row of a filter's planes to compute, and `to` begins with it, or -1 for all
  bool accumulate;      // adds to what `to` holds; of filter_grad only
  int64_t first_pixel;  // columns of the pixels before those that are read or written
};

// Sums down the columns of a matrix, whose rows lie `ld` elements apart. They are added to what sum
// and dot hold.
//
//   total           sum[j] += sum over rows of a[row][j]
//   moments         sum[j] += sum of (a - shift),   dot[j] += sum of (a - shift)^2
//   product         sum[j] += sum of a,             dot[j] += sum of a * (b - shift)
//   gated_product   the same, with zeros for a where (b - shift) * scale + offset <= 0
enum class ColumnSum { total, moments, product, gated_product };

template <class T>
struct ColumnSums {
  ColumnSum kind;
  const T* a;
  const T* b;
  int64_t ld, rows, cols;
  const T *shift, *scale, *offset;  // these five [cols], with room for kColumnPadding more
  T* sum;
  T* dot;
};
constexpr int64_t kColumnPadding = 64;

// The same sums over spans of columns that share their parameters. They are added up in double.
// Within a row, column j of a span goes to lane j % kSpanLanes.
template <class T>
struct SpanSums {
  ColumnSum kind;
  const T* a;
  const T* b;
  int64_t ld, rows;                 // images, say
  int64_t spans, distance, length;  // elements from span to span, and in one
  const T *shift, *scale, *offset;  // these five [spans]
  double* sum;
  double* dot;
};
constexpr int64_t kSpanLanes = 32;

// Rows of spans that are summed up in one chain.
inline int64_t span_chain_rows(int64_t length) {
  const int64_t vectors = ceil_div(length, kSpanLanes);
  return vectors >= kSumChain ? 1 : kSumChain / (vectors > 0 ? vectors : 1);
}

// Maps with parameters for each column, among them n(x) = (x - shift) * scale + offset.
//
//   affine                 n(x)
//   relu_affine            n(max(x, 0))
//   affine_relu            max(n(x), 0)
//   gradient               n(x) + grad * grad_scale
// The gradients of the two with a ReLU, grad_n being grad * grad_scale, with n(x) added in training
// as above (there it isn't the forward map; that one has gate_scale and gate_offset):
//   relu_affine_gradient   of x's ReLU's input: zero where x, which is that ReLU's result, is <= 0
//   affine_relu_gradient   of x, with zeros for grad where the forward map of x is <= 0
// A NaN passes a ReLU and opens its gate, as in PyTorch.
enum class ColumnMapKind {
  affine,
  relu_affine,
  affine_relu,
  gradient,
  relu_affine_gradient,
  relu_affine_eval_gradient,
  affine_relu_gradient,
  affine_relu_eval_gradient,
};

// Everything but the parameters has rows `ld` elements apart; out overlaps nothing, or is x where
// cols is a multiple of the lanes.
template <class T>
struct ColumnMap {
  ColumnMapKind kind;
  const T* x;
  const T* grad;  // or null
  int64_t ld, rows, cols;
  const T *shift, *scale, *offset, *grad_scale, *gate_scale, *gate_offset;  // [cols], as above
  T* out;
};

// One axis of a grid of elements that is cut into phases: position i is found at
// i % phases * phase_step + i / phases * step.
struct PhasedAxis {
  int64_t phases, phase_step, step;
  int64_t offset(int64_t i) const {
    return phases == 1 ? i * step : i % phases * phase_step + i / phases * step;
  }
};

// Copies a matrix into such a grid, from position (first_row, first_col) on, or several into as
// many grids. The grids' columns have step 1.
template <class T>
struct PhasedCopy {
  const T* from;
  int64_t ld_from, rows, cols;
  T* to;
  PhasedAxis row, col;
  int64_t first_row, first_col;
  int64_t planes = 1, from_plane = 0, to_plane = 0;  // how many, and their distances
};

// A rectangle of pixels that all meet the same rectangle of a depthwise kernel's taps. Channels lie
// side by side in all three tensors; what else lies how far apart is told in elements.
//
//   depthwise_pixels    pixel[p][c] = init[c] + sum over taps t of source[p + t][c] * weight[t][c]
//   depthwise_weights   weight[t][c] += sum over pixels p of source[p + t][c] * pixel[p][c]
//
// The first sums in the order tap row, tap column, in chains of `chain_rows` rows of taps that are
// added up in pixel; with `accumulate` the first is added to what pixel held. The second sums in
// the order row, column, in one chain: the caller sees to its length, and that there are taps, at
// most kDepthwiseTaps in a row and in a column.
constexpr int64_t kDepthwiseTaps = 3;
template <class T>
struct DepthwiseTile {
  const T* source;  // what the first tap of the first pixel meets
  T* weight;
  T* pixel;
  int64_t rows, columns, source_row, source_column, pixel_row, pixel_column;
  int64_t tap_rows, tap_columns, tap_row, tap_column, weight_row, weight_column;
  int64_t channels;
  int64_t chain_rows;
  const T* init;  // or null for zeros
  bool accumulate;
};

// Planes of pixels of a depthwise convolution, or some rows of each. In a plane pixel (r, c) and
// the tap of row i and column k meet at source[r * source_row + c + i * tap_row + tap_columns[k]].
//
//   depthwise_planes          pixel[p] = init + sum over taps t of source[p + t] * weight[t]
//   depthwise_plane_weights   sum over pixels p of source[p + t] * pixel[p] for every tap t
//
// The first sums in the order tap row, tap column, in one chain; with `accumulate` it is added to
// what pixel held. Sources may be read up to two vectors past a row's last pixel. The second has
// pixels of column c in lane c % kPlaneLanes of lane_sums[t][kPlaneLanes]; a lane sums up
// kPlaneWeightRows rows at a time column by column, in one chain, of whose length the caller takes
// care. With `accumulate` lane_sums is added to, otherwise set. Where `totals` is not null the
// lanes are added up instead, into totals[t].
constexpr int64_t kPlaneLanes = 16;
constexpr int64_t kPlaneWeightRows = 4;
template <class T>
struct DepthwisePlanes {
  int64_t planes;
  const T* source;
  int64_t source_plane, source_row, tap_row;
  const int64_t* tap_columns;
  int64_t tap_row_count, tap_column_count;
  T* pixel;
  int64_t pixel_plane, pixel_row, rows, columns;
  bool accumulate;
  // depthwise_planes
  const T* weight;
  int64_t weight_plane, weight_row, weight_column;
  const T* init;  // [plane], or null for zeros
  // depthwise_plane_weights, each with its planes next to each other
  T* lane_sums;
  T* totals;
};

// Copies planes; every other column goes to the same place as the one before it, but `odd` > 0
// elements further, unless that is 0. Up to a vector of zeros may be written past the end of a row.
template <class T>
struct PlanesCopy {
  int64_t planes, rows, columns;
  const T* from;
  int64_t from_plane, from_row;
  T* to;
  int64_t to_plane, to_row, odd;
};

// The same maps of spans of columns that share their parameters, each at least kSpanLanes long.
template <class T>
struct SpanMap {
  ColumnMapKind kind;
  const T* x;
  const T* grad;  // or null
  int64_t ld, rows;
  int64_t spans, distance, length;
  const T *shift, *scale, *offset, *grad_scale, *gate_scale, *gate_offset;  // [spans]
  T* out;
};

// A block of the product of two matrices that were laid out for it, row k after row k:
//
//   out[r * ld_out + lane] =
//       init[r] + sum over k of left[k * ld_left + r] * right[k * vectors * lanes + lane]
//
// Chains, init and `accumulate` as in GatherTile.
template <class T>
struct PanelTile {
  const T* left;
  int64_t ld_left;
  const T* right;
  int64_t k, chain;
  const T* init;  // or null for zeros
  T* out;
  int64_t ld_out;
  int rows;     // 1 to panel_rows
  int vectors;  // 1 to panel_vectors
  bool accumulate;
};

// Lays out a piece of such a right matrix: `length` elements, at most panel_vectors vectors of
// them, from `from + taps[k]` to row k, for every k. With `whole` there is room for whole vectors.
template <class T>
struct PanelCopy {
  const T* from;
  const int64_t* taps;
  int64_t k;
  T* to;
  int64_t ld_to;
  int length;
  bool whole;
};

// Kernels for one accumulation type, float or double.
template <class T>
struct VectorKernels {
  int lanes;  // of one vector

  // Most vectors of a gather tile, and most rows with 1, 2, ... of them.
  int most_vectors;
  int gather_rows[4];
  void (*gather)(const GatherTile<T>&);

  // c[rows][cols] (+)= a * b over k, from packed panels a[k][gemm_rows] and b[k][gemm_cols].
  int gemm_rows, gemm_cols;
  void (*gemm)(int64_t k, const T* a, const T* b, T* c, int64_t ld_c, int rows, int cols,
               bool accumulate);

  // to[c][r] = from[r][c]
  void (*transpose)(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows,
                    int64_t cols);

  void (*phased_copy)(const PhasedCopy<T>&);
  void (*multiply)(const Multiply<T>&);
  void (*winograd)(const WinogradTiles<T>&);

  void (*column_sums)(const ColumnSums<T>&);
  void (*column_map)(const ColumnMap<T>&);
  void (*span_sums)(const SpanSums<T>&);
  void (*span_map)(const SpanMap<T>&);

  // n elements at element `offset` of a tensor of any dtype that accumulates in T.
  void (*load)(DType dtype, const void* from, int64_t offset, T* to, int64_t n);
  void (*store)(const T* from, DType dtype, void* to, int64_t offset, int64_t n);

  void (*depthwise_pixels)(const DepthwiseTile<T>&);
  void (*depthwise_weights)(const DepthwiseTile<T>&);
  // Computes nothing of use: `steps` rounds of fused multiply-adds in registers. Leaves a vector of
  // results in sums, and returns the number of floating-point operations.
  int64_t (*fma_loop)(int64_t steps, T* sums);

  void (*depthwise_planes)(const DepthwisePlanes<T>&);
  void (*depthwise_plane_weights)(const DepthwisePlanes<T>&);
  void (*copy_planes)(const PlanesCopy<T>&);
  // to[r][c] = (c % 2 ? odd : even)[r][c / 2]. May read a vector past the end of a row.
  void (*interleave_rows)(const T* even, const T* odd, int64_t ld_from, T* to, int64_t ld_to,
                          int64_t rows, int64_t cols);

  int panel_rows, panel_vectors;
  void (*panel_tile)(const PanelTile<T>&);
  void (*panel_copy)(const PanelCopy<T>&);
};

struct IsaKernels {
  const char* name;
  bool (*runs_here)();  // does this CPU, and its operating system, have the instructions?
  VectorKernels<float> f32;
  VectorKernels<double> f64;

  template <class T>
  const VectorKernels<T>& of() const;
};

template <>
inline const VectorKernels<float>& IsaKernels::of<float>() const {
  return f32;
}
template <>
inline const VectorKernels<double>& IsaKernels::of<double>() const {
  return f64;
}

const IsaKernels& scalar_kernels();
#if defined(__x86_64__)
const IsaKernels& avx2_kernels();
const IsaKernels& avx512_kernels();
#endif

// The table in use. The widest that this CPU runs, unless CONVEXT_CPU_ISA or set_isa() said
// otherwise.
const IsaKernels& kernels();

// All tables in the build, narrowest first.
int isa_count();
const IsaKernels& isa_at(int index);

// False, with nothing changed, when no such ISA is in the build or the CPU cannot run it.
bool set_isa(const char* name);

// The value of CONVEXT_CPU_ISA if it was set and could not be followed, else null: the host turns
// it into an import error.
const char* refused_isa();

}  // namespace convext::cpu
