#include "cpu/kernels/gemm.h"

#include <algorithm>

namespace convext::cpu {
namespace {

// A panel of b stays in the first-level cache over a column of tiles, the block of a in the second
// level, the block of b in the last: 256 * 32 floats are 32 KiB, 256 * 168 are 172 KiB.
constexpr int64_t kBlockK = 256;
constexpr int64_t kBlockM = 168;  // a multiple of 4, 6 and 14, the tiles' rows
constexpr int64_t kBlockN = 1024;

// packed[panel][k][width]: `width` neighbouring lines of the matrix, side by side, zeros past the
// end. A line is a row of a or a column of b; along k the elements are k_stride apart.
template <class T>
void pack(const VectorKernels<T>& isa, const T* from, int64_t line_stride, int64_t k_stride,
          int64_t lines, int64_t k, int64_t width, T* packed) {
  for (int64_t first = 0; first < lines; first += width, packed += width * k) {
    const int64_t count = std::min(width, lines - first);
    const T* panel = from + first * line_stride;
    if (count < width) std::fill(packed, packed + width * k, T(0));
    if (line_stride == 1) {
      for (int64_t i = 0; i < k; ++i) {
        std::copy(panel + i * k_stride, panel + i * k_stride + count, packed + i * width);
      }
    } else if (k_stride == 1) {
      isa.transpose(panel, line_stride, packed, width, count, k);
    } else {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          packed[i * width + j] = panel[j * line_stride + i * k_stride];
        }
      }
    }
  }
}

}  // namespace

template <class T>
GemmWorkspace<T>::GemmWorkspace(const VectorKernels<T>& isa, int64_t m, int64_t n, int64_t k,
                                Arena& arena)
    : isa(isa) {
  const int64_t block_k = std::min(k, kBlockK);
  a = arena.take<T>(round_up(std::min(m, kBlockM), isa.gemm_rows) * block_k);
  b = arena.take<T>(round_up(std::min(n, kBlockN), isa.gemm_cols) * block_k);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, T* c, int64_t ld_c,
          bool accumulate, const GemmWorkspace<T>& workspace) {
  const VectorKernels<T>& isa = workspace.isa;
  const int64_t tile_rows = isa.gemm_rows, tile_cols = isa.gemm_cols;
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::fill(c + i * ld_c, c + i * ld_c + n, T(0));
  }
  for (int64_t j0 = 0; j0 < n; j0 += kBlockN) {
    const int64_t block_n = std::min(kBlockN, n - j0);
    for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
      const int64_t block_k = std::min(kBlockK, k - k0);
      pack(isa, b.data + k0 * b.row_stride + j0 * b.col_stride, b.col_stride, b.row_stride, block_n,
           block_k, tile_cols, workspace.b);
      for (int64_t i0 = 0; i0 < m; i0 += kBlockM) {
        const int64_t block_m = std::min(kBlockM, m - i0);
        pack(isa, a.data + i0 * a.row_stride + k0 * a.col_stride, a.row_stride, a.col_stride,
             block_m, block_k, tile_rows, workspace.a);
        for (int64_t j = 0; j < block_n; j += tile_cols) {
          for (int64_t i = 0; i < block_m; i += tile_rows) {
            isa.gemm(block_k, workspace.a + i * block_k, workspace.b + j * block_k,
                     c + (i0 + i) * ld_c + j0 + j, ld_c, int(std::min(tile_rows, block_m - i)),
                     int(std::min(tile_cols, block_n - j)), accumulate || k0 > 0);
          }
        }
      }
    }
  }
}

template struct GemmWorkspace<float>;
template struct GemmWorkspace<double>;
template void gemm(int64_t, int64_t, int64_t, MatrixView<float>, MatrixView<float>, float*, int64_t,
                   bool, const GemmWorkspace<float>&);
template void gemm(int64_t, int64_t, int64_t, MatrixView<double>, MatrixView<double>, double*,
                   int64_t, bool, const GemmWorkspace<double>&);

}  // namespace convext::cpu
