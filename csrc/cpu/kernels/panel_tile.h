// Matrix product of operands laid out for it (see PanelTile). Included by tiles.h.
#pragma once

template <class T, int kVectors, int kRows>
void panel_product(const PanelTile<T>& t) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes;
  const int64_t ld_left = t.ld_left;
  const T *left = t.left, *right = t.right, *init = t.init;
  bool accumulate = t.accumulate;
  int64_t rest = t.k;
  do {
    V sum[kRows][kVectors];
    CONVEXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V start = init ? V::broadcast(init[r]) : V::zero();
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = start;
    }
    const int64_t chain = rest < t.chain ? rest : t.chain;
    rest -= chain;
    for (int64_t k = 0; k < chain; ++k, left += ld_left, right += kVectors * kLanes) {
      V column[kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = V::load(right + v * kLanes);
      CONVEXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V x = V::broadcast(left[r]);
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
    CONVEXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        T* p = t.out + r * t.ld_out + v * kLanes;
        (accumulate ? add(V::load(p), sum[r][v]) : sum[r][v]).store(p);
      }
    }
    init = nullptr;
    accumulate = true;
  } while (rest > 0);
}

template <class T, int kVectors = kPanelVectors, int kRows = kPanelRows>
void panel_tile(const PanelTile<T>& t) {
  if constexpr (kVectors > 1) {
    if (t.vectors < kVectors) return panel_tile<T, kVectors - 1, kRows>(t);
  }
  if constexpr (kRows > 1) {
    if (t.rows < kRows) return panel_tile<T, kVectors, kRows - 1>(t);
  }
  panel_product<T, kVectors, kRows>(t);
}

template <class T, int kVectors = kPanelVectors>
void panel_copy(const PanelCopy<T>& c) {
  using V = Vec<T>;
  constexpr int kLanes = V::lanes, kBefore = (kVectors - 1) * kLanes;
  if constexpr (kVectors > 1) {
    if (c.length <= kBefore) return panel_copy<T, kVectors - 1>(c);
  }
  const int rest = c.length - kBefore;
  T* to = c.to;
  for (int64_t k = 0; k < c.k; ++k, to += c.ld_to) {
    const T* from = c.from + c.taps[k];
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors - 1; ++v) V::load(from + v * kLanes).store(to + v * kLanes);
    const V last = V::load_first(from + kBefore, rest);
    if (c.whole) {
      last.store(to + kBefore);
    } else {
      last.store_first(to + kBefore, rest);
    }
  }
}
