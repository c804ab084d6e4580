// Sums and maps over the columns of a matrix (see ColumnSums and ColumnMap), the vector code of
// batch norm. Included by tiles.h.
#pragma once

// Adds what an element of a, and one of b where the kind has it, contributes to its sums.
template <class T, ColumnSum kKind>
CONVEXT_INLINE void add_to_sums(Vec<T> a, Vec<T> b, Vec<T> shift, Vec<T> scale, Vec<T> offset,
                                Vec<T>& sum, Vec<T>& dot) {
  if constexpr (kKind == ColumnSum::moments) {
    a = sub(a, shift);
    dot = fma(a, a, dot);
  } else if constexpr (kKind != ColumnSum::total) {
    const Vec<T> d = sub(b, shift);
    if constexpr (kKind == ColumnSum::gated_product) a = keep_positive(a, fma(d, scale, offset));
    dot = fma(a, d, dot);
  }
  sum = add(a, sum);
}

// Calls body with the kind as a type, an integral_constant.
template <class Body>
CONVEXT_INLINE void with_sum_kind(ColumnSum kind, const Body& body) {
  using K = ColumnSum;
  switch (kind) {
    case K::total:
      return body(std::integral_constant<K, K::total>());
    case K::moments:
      return body(std::integral_constant<K, K::moments>());
    case K::product:
      return body(std::integral_constant<K, K::product>());
    case K::gated_product:
      return body(std::integral_constant<K, K::gated_product>());
  }
}

template <class Body>
CONVEXT_INLINE void with_map_kind(ColumnMapKind kind, const Body& body) {
  using K = ColumnMapKind;
  switch (kind) {
    case K::affine:
      return body(std::integral_constant<K, K::affine>());
    case K::relu_affine:
      return body(std::integral_constant<K, K::relu_affine>());
    case K::affine_relu:
      return body(std::integral_constant<K, K::affine_relu>());
    case K::gradient:
      return body(std::integral_constant<K, K::gradient>());
    case K::relu_affine_gradient:
      return body(std::integral_constant<K, K::relu_affine_gradient>());
    case K::relu_affine_eval_gradient:
      return body(std::integral_constant<K, K::relu_affine_eval_gradient>());
    case K::affine_relu_gradient:
      return body(std::integral_constant<K, K::affine_relu_gradient>());
    case K::affine_relu_eval_gradient:
      return body(std::integral_constant<K, K::affine_relu_eval_gradient>());
  }
}

constexpr bool reads_two(ColumnSum kind) {
  return kind == ColumnSum::product || kind == ColumnSum::gated_product;
}

// A tile of kVectors adjacent vectors of columns, the last one with only `last` lanes where
// kPartial, and of one chain of rows. What comes `ahead` elements later is fetched into the cache.
template <class T, ColumnSum kKind, int kVectors, bool kPartial>
void sum_columns(const ColumnSums<T>& s, int64_t row, int64_t rows, int64_t column, int last,
                 int64_t ahead) {
  using V = Vec<T>;
  const auto read = [last](const T* p, int v) {
    p += v * V::lanes;
    return kPartial && v == kVectors - 1 ? V::load_first(p, last) : V::load(p);
  };
  constexpr bool kGated = kKind == ColumnSum::gated_product;
  V shift[kVectors], scale[kVectors], offset[kVectors], sum[kVectors], dot[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = kKind == ColumnSum::total ? V::zero() : read(s.shift + column, v);
    scale[v] = kGated ? read(s.scale + column, v) : V::zero();
    offset[v] = kGated ? read(s.offset + column, v) : V::zero();
    sum[v] = dot[v] = V::zero();
  }
  const T* a = s.a + row * s.ld + column;
  const T* b = s.b + row * s.ld + column;
  for (int64_t r = 0; r < rows; ++r, a += s.ld, b += s.ld) {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      prefetch(a + v * V::lanes + ahead);
      if constexpr (reads_two(kKind)) prefetch(b + v * V::lanes + ahead);
      add_to_sums<T, kKind>(read(a, v), reads_two(kKind) ? read(b, v) : V::zero(), shift[v],
                            scale[v], offset[v], sum[v], dot[v]);
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

template <class T, ColumnSum kKind>
void sum_chain_of_rows(const ColumnSums<T>& s, int64_t row, int64_t rows) {
  constexpr int kLanes = Vec<T>::lanes, kTile = 4 * kLanes;
  int64_t column = 0;
  for (; column + 2 * kTile <= s.cols; column += kTile) {
    sum_columns<T, kKind, 4, false>(s, row, rows, column, 0, kTile);
  }
  // Then the next chain begins.
  const int64_t ahead = kSumChain * s.ld - column;
  for (; column + kTile <= s.cols; column += kTile) {
    sum_columns<T, kKind, 4, false>(s, row, rows, column, 0, ahead);
  }
  const int rest = int(s.cols - column), last = rest % kLanes;
  switch (rest / kLanes * 2 + (last > 0)) {
    case 1:
      return sum_columns<T, kKind, 1, true>(s, row, rows, column, last, ahead);
    case 2:
      return sum_columns<T, kKind, 1, false>(s, row, rows, column, 0, ahead);
    case 3:
      return sum_columns<T, kKind, 2, true>(s, row, rows, column, last, ahead);
    case 4:
      return sum_columns<T, kKind, 2, false>(s, row, rows, column, 0, ahead);
    case 5:
      return sum_columns<T, kKind, 3, true>(s, row, rows, column, last, ahead);
    case 6:
      return sum_columns<T, kKind, 3, false>(s, row, rows, column, 0, ahead);
    case 7:
      return sum_columns<T, kKind, 4, true>(s, row, rows, column, last, ahead);
  }
}

template <class T, ColumnSum kKind>
void sum_all_columns(const ColumnSums<T>& s) {
  for (int64_t row = 0; row < s.rows; row += kSumChain) {
    sum_chain_of_rows<T, kKind>(s, row, s.rows - row < kSumChain ? s.rows - row : kSumChain);
  }
}

template <class T>
void column_sums(const ColumnSums<T>& s) {
  with_sum_kind(s.kind, [&](auto kind) { sum_all_columns<T, decltype(kind)::value>(s); });
}

// Rows that a map goes down before it goes on to the next columns. Long ones are often a power of
// two apart, and then only a few of their lines fit in the first-level cache side by side.
inline int64_t map_rows_at_a_time(int64_t cols) {
  return cols < 1024 ? 8 : 2;
}

// A ColumnMap's parameters for a vector of columns, and what they make of it.
template <class T, ColumnMapKind kKind>
struct MapTile {
  using V = Vec<T>;
  using K = ColumnMapKind;
  static constexpr bool kReluIn =
      kKind == K::relu_affine_gradient || kKind == K::relu_affine_eval_gradient;
  static constexpr bool kReluOut =
      kKind == K::affine_relu_gradient || kKind == K::affine_relu_eval_gradient;
  static constexpr bool kEval =
      kKind == K::relu_affine_eval_gradient || kKind == K::affine_relu_eval_gradient;
  static constexpr bool kGrad = kReluIn || kReluOut || kKind == K::gradient;

  V shift, scale, offset, grad_scale, gate_scale, gate_offset;

  // read(p) gives the parameters at p in a vector.
  template <class Map, class Read>
  CONVEXT_INLINE void set(const Map& m, const Read& read) {
    shift = read(m.shift);
    scale = kEval ? V::zero() : read(m.scale);
    offset = kEval ? V::zero() : read(m.offset);
    grad_scale = kGrad ? read(m.grad_scale) : V::zero();
    gate_scale = kReluOut ? read(m.gate_scale) : V::zero();
    gate_offset = kReluOut ? read(m.gate_offset) : V::zero();
  }

  CONVEXT_INLINE void map(const T* from, const T* grads, T* out) const {
    V x = V::load(from);
    if constexpr (kKind == K::relu_affine) x = relu(x);
    const V d = sub(x, shift);
    V y = fma(d, scale, offset);
    if constexpr (kKind == K::affine_relu) y = relu(y);
    if constexpr (kGrad) {
      V grad = V::load(grads);
      if constexpr (kReluOut) grad = keep_positive(grad, fma(d, gate_scale, gate_offset));
      y = kEval ? mul(grad, grad_scale) : fma(grad, grad_scale, y);
      if constexpr (kReluIn) y = keep_positive(y, x);
    }
    y.store(out);
  }
};

template <class T, ColumnMapKind kKind, int kVectors>
void map_columns(const ColumnMap<T>& m, int64_t row, int64_t rows, int64_t column, int64_t ahead) {
  using V = Vec<T>;
  MapTile<T, kKind> tile[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    tile[v].set(m, [&](const T* from) { return V::load(from + column + v * V::lanes); });
  }
  for (int64_t r = row; r < row + rows; ++r) {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = r * m.ld + column + v * V::lanes;
      prefetch_to_write(m.out + i + ahead);
      tile[v].map(m.x + i, m.grad + i, m.out + i);
    }
  }
}

template <class T, ColumnMapKind kKind>
void map_rows(const ColumnMap<T>& m, int64_t row, int64_t rows) {
  constexpr int kLanes = Vec<T>::lanes;
  constexpr int kVectors = kKind < ColumnMapKind::gradient ? 4 : 2;  // what the registers hold
  constexpr int kTile = kVectors * kLanes;
  int64_t column = 0;
  for (; column + 2 * kTile <= m.cols; column += kTile) {
    map_columns<T, kKind, kVectors>(m, row, rows, column, kTile);
  }
  const int64_t ahead = map_rows_at_a_time(m.cols) * m.ld - column;  // where the next rows begin
  for (; column + kTile <= m.cols; column += kTile) {
    map_columns<T, kKind, kVectors>(m, row, rows, column, ahead);
  }
  for (; column + kLanes <= m.cols; column += kLanes) {
    map_columns<T, kKind, 1>(m, row, rows, column, ahead);
  }
  // Writes some columns twice, with the same values.
  if (column < m.cols) map_columns<T, kKind, 1>(m, row, rows, m.cols - kLanes, 0);
}

// Fewer columns than a vector has lanes go through the stack.
template <class T, ColumnMapKind kKind>
void map_narrow_row(const ColumnMap<T>& m, int64_t row) {
  constexpr int kLanes = Vec<T>::lanes;
  T values[2 * kLanes] = {};
  T* grad = values + kLanes;
  for (int64_t j = 0; j < m.cols; ++j) {
    values[j] = m.x[row * m.ld + j];
    if (m.grad) grad[j] = m.grad[row * m.ld + j];
  }
  ColumnMap<T> one = m;
  one.x = one.out = values;
  one.grad = grad;
  map_columns<T, kKind, 1>(one, 0, 1, 0, 0);
  std::memcpy(m.out + row * m.ld, values, m.cols * sizeof(T));
}

template <class T, ColumnMapKind kKind>
void map_all_columns(const ColumnMap<T>& m) {
  if (m.cols < Vec<T>::lanes) {
    for (int64_t r = 0; r < m.rows; ++r) map_narrow_row<T, kKind>(m, r);
    return;
  }
  const int64_t most = map_rows_at_a_time(m.cols);
  for (int64_t row = 0; row < m.rows; row += most) {
    map_rows<T, kKind>(m, row, m.rows - row < most ? m.rows - row : most);
  }
}

// Parameters have room for kColumnPadding more.
template <class T>
void column_map(const ColumnMap<T>& m) {
  with_map_kind(m.kind, [&](auto kind) { map_all_columns<T, decltype(kind)::value>(m); });
}
