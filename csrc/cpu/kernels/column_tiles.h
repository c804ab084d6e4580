// Sums and maps over the columns of a matrix (see ColumnSums and ColumnMap), the vector code of
// batch norm. Included by tiles.h.
#pragma once

// kVectors adjacent vectors of columns, of which the last one has only `last` lanes where kPartial.
template <class T, ColumnSum kKind, int kVectors, bool kPartial>
void sum_columns(const ColumnSums<T>& s, int64_t column, int last) {
  using V = Vec<T>;
  const auto read = [last](const T* p, int v) {
    p += v * V::lanes;
    return kPartial && v == kVectors - 1 ? V::load_first(p, last) : V::load(p);
  };
  constexpr bool kGated = kKind == ColumnSum::gated_product;
  V shift[kVectors], scale[kVectors], offset[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = kKind == ColumnSum::total ? V::zero() : read(s.shift + column, v);
    scale[v] = kGated ? read(s.scale + column, v) : V::zero();
    offset[v] = kGated ? read(s.offset + column, v) : V::zero();
  }
  for (int64_t first = 0; first < s.rows; first += kSumChain) {
    const int64_t end = s.rows - first < kSumChain ? s.rows : first + kSumChain;
    V sum[kVectors], dot[kVectors];
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = dot[v] = V::zero();
    for (int64_t r = first; r < end; ++r) {
      const T* a = s.a + r * s.ld + column;
      const T* b = s.b + r * s.ld + column;
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        V x = read(a, v);
        if constexpr (kKind == ColumnSum::moments) {
          x = sub(x, shift[v]);
          dot[v] = fma(x, x, dot[v]);
        } else if constexpr (kKind == ColumnSum::product || kGated) {
          const V d = sub(read(b, v), shift[v]);
          if constexpr (kGated) x = keep_positive(x, fma(d, scale[v], offset[v]));
          dot[v] = fma(x, d, dot[v]);
        }
        sum[v] = add(x, sum[v]);
      }
    }
    T* total = s.sum + column;
    T* dots = s.dot + column;
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      add(V::load(total + v * V::lanes), sum[v]).store(total + v * V::lanes);
      if constexpr (kKind != ColumnSum::total) {
        add(V::load(dots + v * V::lanes), dot[v]).store(dots + v * V::lanes);
      }
    }
  }
}

template <class T, ColumnSum kKind>
void sum_all_columns(const ColumnSums<T>& s) {
  constexpr int kLanes = Vec<T>::lanes;
  int64_t column = 0;
  for (; column + 4 * kLanes <= s.cols; column += 4 * kLanes) {
    sum_columns<T, kKind, 4, false>(s, column, 0);
  }
  const int rest = int(s.cols - column), last = rest % kLanes;
  switch (rest / kLanes * 2 + (last > 0)) {
    case 1:
      return sum_columns<T, kKind, 1, true>(s, column, last);
    case 2:
      return sum_columns<T, kKind, 1, false>(s, column, 0);
    case 3:
      return sum_columns<T, kKind, 2, true>(s, column, last);
    case 4:
      return sum_columns<T, kKind, 2, false>(s, column, 0);
    case 5:
      return sum_columns<T, kKind, 3, true>(s, column, last);
    case 6:
      return sum_columns<T, kKind, 3, false>(s, column, 0);
    case 7:
      return sum_columns<T, kKind, 4, true>(s, column, last);
  }
}

template <class T>
void column_sums(const ColumnSums<T>& s) {
  switch (s.kind) {
    case ColumnSum::total:
      return sum_all_columns<T, ColumnSum::total>(s);
    case ColumnSum::moments:
      return sum_all_columns<T, ColumnSum::moments>(s);
    case ColumnSum::product:
      return sum_all_columns<T, ColumnSum::product>(s);
    case ColumnSum::gated_product:
      return sum_all_columns<T, ColumnSum::gated_product>(s);
  }
}

template <class T, ColumnMapKind kKind, int kVectors>
void map_columns(const ColumnMap<T>& m, int64_t column) {
  using V = Vec<T>;
  using K = ColumnMapKind;
  constexpr bool kReluIn =
      kKind == K::relu_affine_gradient || kKind == K::relu_affine_eval_gradient;
  constexpr bool kReluOut =
      kKind == K::affine_relu_gradient || kKind == K::affine_relu_eval_gradient;
  constexpr bool kEval =
      kKind == K::relu_affine_eval_gradient || kKind == K::affine_relu_eval_gradient;
  constexpr bool kGrad = kReluIn || kReluOut || kKind == K::gradient;
  const auto parameters = [&](const T* from, int v) {
    return V::load(from + column + v * V::lanes);
  };
  V shift[kVectors], scale[kVectors], offset[kVectors], grad_scale[kVectors];
  V gate_scale[kVectors], gate_offset[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = parameters(m.shift, v);
    scale[v] = kEval ? V::zero() : parameters(m.scale, v);
    offset[v] = kEval ? V::zero() : parameters(m.offset, v);
    grad_scale[v] = kGrad ? parameters(m.grad_scale, v) : V::zero();
    gate_scale[v] = kReluOut ? parameters(m.gate_scale, v) : V::zero();
    gate_offset[v] = kReluOut ? parameters(m.gate_offset, v) : V::zero();
  }
  for (int64_t r = 0; r < m.rows; ++r) {
    const int64_t row = r * m.ld + column;
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row + v * V::lanes;
      V x = V::load(m.x + i);
      if constexpr (kKind == K::relu_affine) x = relu(x);
      const V d = sub(x, shift[v]);
      V y = fma(d, scale[v], offset[v]);
      if constexpr (kKind == K::affine_relu) y = relu(y);
      if constexpr (kGrad) {
        V grad = V::load(m.grad + i);
        if constexpr (kReluOut) grad = keep_positive(grad, fma(d, gate_scale[v], gate_offset[v]));
        y = kEval ? mul(grad, grad_scale[v]) : fma(grad, grad_scale[v], y);
        if constexpr (kReluIn) y = keep_positive(y, x);
      }
      y.store(m.out + i);
    }
  }
}

template <class T, ColumnMapKind kKind>
void map_all_columns(const ColumnMap<T>& m) {
  constexpr int kLanes = Vec<T>::lanes;
  constexpr int kVectors = kKind < ColumnMapKind::gradient ? 4 : 2;  // what the registers hold
  int64_t column = 0;
  for (; column + kVectors * kLanes <= m.cols; column += kVectors * kLanes) {
    map_columns<T, kKind, kVectors>(m, column);
  }
  for (; column + kLanes <= m.cols; column += kLanes) map_columns<T, kKind, 1>(m, column);
  if (column == m.cols) return;
  if (m.cols >= kLanes) {  // writes some columns twice, with the same values
    map_columns<T, kKind, 1>(m, m.cols - kLanes);
    return;
  }
  for (int64_t r = 0; r < m.rows; ++r) {  // a few elements: as one vector, through the stack
    T row[2 * kLanes] = {};
    T* grad = row + kLanes;
    for (int64_t j = 0; j < m.cols; ++j) {
      row[j] = m.x[r * m.ld + j];
      if (m.grad) grad[j] = m.grad[r * m.ld + j];
    }
    ColumnMap<T> one = m;
    one.x = one.out = row;
    one.grad = grad;
    one.rows = 1;
    map_columns<T, kKind, 1>(one, 0);
    std::memcpy(m.out + r * m.ld, row, m.cols * sizeof(T));
  }
}

// Parameters have room for kColumnPadding more.
template <class T>
void column_map(const ColumnMap<T>& m) {
  using K = ColumnMapKind;
  switch (m.kind) {
    case K::affine:
      return map_all_columns<T, K::affine>(m);
    case K::relu_affine:
      return map_all_columns<T, K::relu_affine>(m);
    case K::affine_relu:
      return map_all_columns<T, K::affine_relu>(m);
    case K::gradient:
      return map_all_columns<T, K::gradient>(m);
    case K::relu_affine_gradient:
      return map_all_columns<T, K::relu_affine_gradient>(m);
    case K::relu_affine_eval_gradient:
      return map_all_columns<T, K::relu_affine_eval_gradient>(m);
    case K::affine_relu_gradient:
      return map_all_columns<T, K::affine_relu_gradient>(m);
    case K::affine_relu_eval_gradient:
      return map_all_columns<T, K::affine_relu_eval_gradient>(m);
  }
}
