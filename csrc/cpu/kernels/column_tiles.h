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
  V shift[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = kKind == ColumnSum::total ? V::zero() : read(s.shift + column, v);
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
        } else if constexpr (kKind == ColumnSum::product) {
          dot[v] = fma(x, sub(read(b, v), shift[v]), dot[v]);
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
  }
}

template <class T, bool kGrad, int kVectors>
void map_columns(const ColumnMap<T>& m, int64_t column) {
  using V = Vec<T>;
  V shift[kVectors], scale[kVectors], offset[kVectors], grad_scale[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t j = column + v * V::lanes;
    shift[v] = V::load(m.shift + j);
    scale[v] = V::load(m.scale + j);
    offset[v] = V::load(m.offset + j);
    grad_scale[v] = kGrad ? V::load(m.grad_scale + j) : V::zero();
  }
  for (int64_t r = 0; r < m.rows; ++r) {
    const int64_t row = r * m.ld + column;
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row + v * V::lanes;
      V y = fma(sub(V::load(m.x + i), shift[v]), scale[v], offset[v]);
      if constexpr (kGrad) y = fma(V::load(m.grad + i), grad_scale[v], y);
      y.store(m.out + i);
    }
  }
}

template <class T, bool kGrad>
void map_all_columns(const ColumnMap<T>& m) {
  constexpr int kLanes = Vec<T>::lanes;
  constexpr int kVectors = kGrad ? 2 : 4;  // what the registers hold
  int64_t column = 0;
  for (; column + kVectors * kLanes <= m.cols; column += kVectors * kLanes) {
    map_columns<T, kGrad, kVectors>(m, column);
  }
  for (; column + kLanes <= m.cols; column += kLanes) map_columns<T, kGrad, 1>(m, column);
  if (column == m.cols) return;
  if (m.cols >= kLanes) {  // writes some columns twice, with the same values
    map_columns<T, kGrad, 1>(m, m.cols - kLanes);
    return;
  }
  for (int64_t r = 0; r < m.rows; ++r) {  // a few elements: as one vector, through the stack
    T row[2 * kLanes] = {};
    T* grad = row + kLanes;
    for (int64_t j = 0; j < m.cols; ++j) {
      row[j] = m.x[r * m.ld + j];
      if (kGrad) grad[j] = m.grad[r * m.ld + j];
    }
    ColumnMap<T> one = m;
    one.x = one.out = row;
    one.grad = grad;
    one.rows = 1;
    map_columns<T, kGrad, 1>(one, 0);
    std::memcpy(m.out + r * m.ld, row, m.cols * sizeof(T));
  }
}

// Parameters have room for kColumnPadding more.
template <class T>
void column_map(const ColumnMap<T>& m) {
  if (m.grad) {
    map_all_columns<T, true>(m);
  } else {
    map_all_columns<T, false>(m);
  }
}
