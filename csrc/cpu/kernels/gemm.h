// Our matrix product: packed and blocked after Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (2008). One call runs on one thread; callers cut the work.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// A matrix by its element strides, so that a transpose is a view.
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride, col_stride;
};

// Room for the packed panels of an m x n x k product or any smaller one.
template <class T>
struct GemmWorkspace {
  GemmWorkspace(const VectorKernels<T>& isa, int64_t m, int64_t n, int64_t k, Arena& arena);
  const VectorKernels<T>& isa;
  T* a;
  T* b;
};

// c[m][n] (+)= a[m][k] * b[k][n], with c's rows ld_c elements apart. Sums run over k in order, in
// blocks of fixed length, whatever m, n and the thread count: the same inputs give the same bits.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, T* c, int64_t ld_c,
          bool accumulate, const GemmWorkspace<T>& workspace);

}  // namespace convext::cpu
