// The two products of a depthwise convolution on planes (see DepthwisePlanes). Lanes run along the
// rows of a plane, so that weights are broadcast. Loads, most of which cross a cache line, are what
// bounds them: rows are computed some at a time, and a vector of the source goes to all that meet
// it. Included by tiles.h.
#pragma once

// How the columns that the taps of a row meet follow each other: on, back, on in two phases by
// turns, or in any way.
enum class TapColumns { on, back, halved, any };

// The offset of the k-th from the first of them; `second` is the second's.
template <TapColumns kColumns>
CONVEXT_INLINE int64_t tap_column(int k, int64_t second) {
  if constexpr (kColumns == TapColumns::on) return k;
  if constexpr (kColumns == TapColumns::back) return -k;
  return k / 2 + (k % 2 ? second : 0);
}

template <class T>
TapColumns tap_columns_of(const DepthwisePlanes<T>& t) {
  const int64_t* at = t.tap_columns;
  if (t.tap_column_count == 1) return TapColumns::on;
  if (t.tap_column_count == 2 && at[1] == at[0] + 1) return TapColumns::on;
  if (t.tap_column_count == 2 && at[1] == at[0] - 1) return TapColumns::back;
  if (t.tap_column_count != 3) return TapColumns::any;
  if (at[1] == at[0] + 1 && at[2] == at[0] + 2) return TapColumns::on;
  if (at[1] == at[0] - 1 && at[2] == at[0] - 2) return TapColumns::back;
  return at[2] == at[0] + 1 ? TapColumns::halved : TapColumns::any;
}

// ---------------------------------------------------------------------------------------------------
// depthwise_planes

// Pixels [column, column + last) of kRows rows, or whole vectors where not kPart.
template <class T, int kRows, int kVectors, bool kPart>
CONVEXT_INLINE void store_pixels(const Vec<T> (&sum)[kRows][kVectors], bool accumulate,
                                 T* const (&pixel)[kRows], int64_t column, int last) {
  using V = Vec<T>;
  CONVEXT_UNROLL
  for (int p = 0; p < kRows; ++p) {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* out = pixel[p] + column + v * V::lanes;
      if constexpr (kPart) {
        const V x = accumulate ? add(V::load_first(out, last), sum[p][v]) : sum[p][v];
        x.store_first(out, last);
      } else {
        (accumulate ? add(V::load(out), sum[p][v]) : sum[p][v]).store(out);
      }
    }
  }
}

// kTapRows x kTapColumns taps; neighbouring rows of pixels are kStep rows of taps apart.
template <int kTapRows, int kTapColumns, int kStep, TapColumns kColumns>
struct PlaneWindow {
  // Rows of sources are pointed to, for which there must be registers.
  static constexpr int kMostRows = kStep == 1 ? kPlaneRows : kPlaneRows / 2;

  template <class T>
  struct Weights {
    Weights(const DepthwisePlanes<T>& t, const T* weights) {
      CONVEXT_UNROLL
      for (int r = 0; r < kTapRows; ++r) {
        CONVEXT_UNROLL
        for (int k = 0; k < kTapColumns; ++k) {
          at[r][k] = Vec<T>::broadcast(weights[r * t.weight_row + k * t.weight_column]);
        }
      }
    }
    Vec<T> at[kTapRows][kTapColumns];
  };

  template <class T, int kRows>
  struct Rows {
    static constexpr int kSources = (kRows - 1) * kStep + kTapRows;

    Rows(const DepthwisePlanes<T>& t, const T* source, T* pixels) {
      const int64_t step = kTapRows == 1 ? t.source_row : t.tap_row;
      source += t.tap_columns[0];
      CONVEXT_UNROLL
      for (int i = 0; i < kSources; ++i) row[i] = source + i * step;
      CONVEXT_UNROLL
      for (int p = 0; p < kRows; ++p) pixel[p] = pixels + p * t.pixel_row;
      second = kColumns == TapColumns::halved ? t.tap_columns[1] - t.tap_columns[0] : 0;
    }

    template <int kVectors, bool kPart>
    CONVEXT_INLINE void compute(const Weights<T>& weight, Vec<T> init, bool accumulate,
                                int64_t column, int last) const {
      Vec<T> sum[kRows][kVectors];
      CONVEXT_UNROLL
      for (int p = 0; p < kRows; ++p) {
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[p][v] = init;
      }
      CONVEXT_UNROLL
      for (int i = 0; i < kSources; ++i) {
        CONVEXT_UNROLL
        for (int k = 0; k < kTapColumns; ++k) {
          CONVEXT_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            const Vec<T> x =
                Vec<T>::load(row[i] + column + tap_column<kColumns>(k, second) + v * Vec<T>::lanes);
            CONVEXT_UNROLL
            for (int p = 0; p < kRows; ++p) {
              const int r = i - p * kStep;
              if (r >= 0 && r < kTapRows) sum[p][v] = fma(x, weight.at[r][k], sum[p][v]);
            }
          }
        }
      }
      store_pixels<T, kRows, kVectors, kPart>(sum, accumulate, pixel, column, last);
    }

    const T* row[kSources];
    T* pixel[kRows];
    int64_t second;
  };
};

// Any taps.
struct PlaneTaps {
  static constexpr int kMostRows = 1;

  template <class T>
  struct Weights {
    Weights(const DepthwisePlanes<T>& tile, const T* weights) : t(tile), at(weights) {}
    const DepthwisePlanes<T>& t;
    const T* at;
  };

  template <class T, int kRows>
  struct Rows {
    Rows(const DepthwisePlanes<T>&, const T* sources, T* pixels) : source(sources), pixel{pixels} {}

    template <int kVectors, bool kPart>
    CONVEXT_INLINE void compute(const Weights<T>& weights, Vec<T> init, bool accumulate,
                                int64_t column, int last) const {
      const DepthwisePlanes<T>& t = weights.t;
      Vec<T> sum[1][kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[0][v] = init;
      for (int64_t r = 0; r < t.tap_row_count; ++r) {
        for (int64_t k = 0; k < t.tap_column_count; ++k) {
          const Vec<T> weight =
              Vec<T>::broadcast(weights.at[r * t.weight_row + k * t.weight_column]);
          const T* from = source + r * t.tap_row + t.tap_columns[k] + column;
          CONVEXT_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            sum[0][v] = fma(Vec<T>::load(from + v * Vec<T>::lanes), weight, sum[0][v]);
          }
        }
      }
      store_pixels<T, 1, kVectors, kPart>(sum, accumulate, pixel, column, last);
    }

    const T* source;
    T* pixel[1];
  };
};

template <class T, class Taps, int kRows>
CONVEXT_INLINE void plane_rows(const DepthwisePlanes<T>& t,
                               const typename Taps::template Weights<T>& weights, Vec<T> init,
                               const T* source, T* pixel) {
  constexpr int64_t kLanes = Vec<T>::lanes, kStep = kPlaneVectors * kLanes;
  const typename Taps::template Rows<T, kRows> rows(t, source, pixel);
  const int64_t columns = t.columns;
  const bool accumulate = t.accumulate;
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    rows.template compute<kPlaneVectors, false>(weights, init, accumulate, column, 0);
  }
  if constexpr (kPlaneVectors > 1) {
    for (; column + kLanes <= columns; column += kLanes) {
      rows.template compute<1, false>(weights, init, accumulate, column, 0);
    }
  }
  if (column == columns) return;
  if (column > 0 && !accumulate) {  // some once more, for a part of a vector is slow to write
    rows.template compute<1, false>(weights, init, false, columns - kLanes, 0);
  } else {
    rows.template compute<1, true>(weights, init, accumulate, column, int(columns - column));
  }
}

// Calls the instance for this many rows, 1 to kMost.
template <class T, class Taps, int kMost>
CONVEXT_INLINE void plane_dispatch(const DepthwisePlanes<T>& t,
                                   const typename Taps::template Weights<T>& weights, Vec<T> init,
                                   const T* source, T* pixel, int64_t rows) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      return plane_dispatch<T, Taps, kMost - 1>(t, weights, init, source, pixel, rows);
    }
  }
  plane_rows<T, Taps, kMost>(t, weights, init, source, pixel);
}

template <class T, class Taps>
void planes_with(const DepthwisePlanes<T>& tile) {
  const DepthwisePlanes<T> t = tile;  // a copy, which no store can change
  constexpr int64_t kMost = Taps::kMostRows;
  for (int64_t plane = 0; plane < t.planes; ++plane) {
    const typename Taps::template Weights<T> weights(t, t.weight + plane * t.weight_plane);
    const Vec<T> init = t.init ? Vec<T>::broadcast(t.init[plane]) : Vec<T>::zero();
    const T* source = t.source + plane * t.source_plane;
    T* pixel = t.pixel + plane * t.pixel_plane;
    int64_t row = 0;
    for (; row + kMost <= t.rows; row += kMost) {
      plane_rows<T, Taps, kMost>(t, weights, init, source, pixel);
      source += kMost * t.source_row;
      pixel += kMost * t.pixel_row;
    }
    if constexpr (kMost > 1) {
      if (row < t.rows) {
        plane_dispatch<T, Taps, kMost - 1>(t, weights, init, source, pixel, t.rows - row);
      }
    }
  }
}

template <class T>
void depthwise_planes(const DepthwisePlanes<T>& tile) {
  DepthwisePlanes<T> t = tile;
  // From the other end, where later taps would otherwise meet earlier pixels' sources.
  if ((t.tap_row < 0) != (t.source_row < 0)) {
    t.source += (t.rows - 1) * t.source_row;
    t.pixel += (t.rows - 1) * t.pixel_row;
    t.source_row = -t.source_row;
    t.pixel_row = -t.pixel_row;
  }
  // 3x3 taps; of a stride of 2, backward_input meets 1 or 2 a row and a column.
  const int64_t taps = t.tap_row_count * 8 + t.tap_column_count;
  const TapColumns columns = tap_columns_of(t);
  constexpr TapColumns on = TapColumns::on, back = TapColumns::back, halved = TapColumns::halved;
  if (t.source_row == t.tap_row) {
    if (taps == 033 && columns == on) return planes_with<T, PlaneWindow<3, 3, 1, on>>(t);
    if (taps == 033 && columns == back) return planes_with<T, PlaneWindow<3, 3, 1, back>>(t);
    if (taps == 022 && columns == back) return planes_with<T, PlaneWindow<2, 2, 1, back>>(t);
    if (taps == 021) return planes_with<T, PlaneWindow<2, 1, 1, on>>(t);
  } else if (t.source_row == 2 * t.tap_row) {
    if (taps == 033 && columns == halved) return planes_with<T, PlaneWindow<3, 3, 2, halved>>(t);
  }
  if (taps == 012 && columns == back) return planes_with<T, PlaneWindow<1, 2, 1, back>>(t);
  if (taps == 011) return planes_with<T, PlaneWindow<1, 1, 1, on>>(t);
  planes_with<T, PlaneTaps>(t);
}

// ---------------------------------------------------------------------------------------------------
// depthwise_plane_weights

// The products of kRows rows of pixels.
template <class T, int kTapRows, int kTapColumns, int kStep, TapColumns kColumns, int kRows>
struct PlaneProducts {
  using V = Vec<T>;
  static constexpr int kSources = (kRows - 1) * kStep + kTapRows;
  static constexpr int kVectors = kPlaneLanes / V::lanes;
  using Sums = V[kTapRows][kTapColumns][kVectors];

  PlaneProducts(const DepthwisePlanes<T>& t, const T* source, const T* pixels) {
    const int64_t step = kTapRows == 1 ? t.source_row : t.tap_row;
    CONVEXT_UNROLL
    for (int i = 0; i < kSources; ++i) row[i] = source + i * step;
    CONVEXT_UNROLL
    for (int p = 0; p < kRows; ++p) pixel[p] = pixels + p * t.pixel_row;
  }

  // Of kPlaneLanes columns, or only the first `last` where kPart.
  template <bool kPart>
  CONVEXT_INLINE void add_to(Sums& sum, int64_t second, int64_t column, int last) const {
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * V::lanes;
      const int rest = last - v * V::lanes;
      const int there = rest < 0 ? 0 : rest < V::lanes ? rest : V::lanes;
      const auto load = [there](const T* p) {
        return kPart ? V::load_first(p, there) : V::load(p);
      };
      V y[kRows];
      CONVEXT_UNROLL
      for (int p = 0; p < kRows; ++p) y[p] = load(pixel[p] + at);
      CONVEXT_UNROLL
      for (int i = 0; i < kSources; ++i) {
        CONVEXT_UNROLL
        for (int k = 0; k < kTapColumns; ++k) {
          const V x = load(row[i] + at + tap_column<kColumns>(k, second));
          CONVEXT_UNROLL
          for (int p = 0; p < kRows; ++p) {
            const int r = i - p * kStep;
            if (r >= 0 && r < kTapRows) sum[r][k][v] = fma(x, y[p], sum[r][k][v]);
          }
        }
      }
    }
  }

  CONVEXT_INLINE void add_to(Sums& sum, int64_t second, int64_t columns) const {
    int64_t column = 0;
    for (; column + kPlaneLanes <= columns; column += kPlaneLanes) {
      add_to<false>(sum, second, column, kPlaneLanes);
    }
    if (column < columns) add_to<true>(sum, second, column, int(columns - column));
  }

  const T* row[kSources];
  const T* pixel[kRows];
};

// All pixels of kTapRows x kTapColumns taps of a plane, from tap (row, first) on.
template <class T, int kTapRows, int kTapColumns, int kStep, TapColumns kColumns>
void plane_taps(const DepthwisePlanes<T>& t, int64_t plane, int64_t row, int64_t first) {
  using V = Vec<T>;
  constexpr int kVectors = kPlaneLanes / V::lanes;
  V sum[kTapRows][kTapColumns][kVectors];
  CONVEXT_UNROLL
  for (int r = 0; r < kTapRows; ++r) {
    CONVEXT_UNROLL
    for (int k = 0; k < kTapColumns; ++k) {
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][k][v] = V::zero();
    }
  }
  const int64_t* at = t.tap_columns + first;
  const int64_t second = kColumns == TapColumns::halved ? at[1] - at[0] : 0;
  const T* source = t.source + plane * t.source_plane + row * t.tap_row + at[0];
  const T* pixel = t.pixel + plane * t.pixel_plane;
  const auto add_rows = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const PlaneProducts<T, kTapRows, kTapColumns, kStep, kColumns, kRows> products(t, source,
                                                                                   pixel);
    products.add_to(sum, second, t.columns);
  };
  static_assert(kPlaneWeightRows == 4);
  int64_t rows = t.rows;
  for (; rows >= 4; rows -= 4, source += 4 * t.source_row, pixel += 4 * t.pixel_row) {
    add_rows(std::integral_constant<int, 4>());
  }
  if (rows == 3) add_rows(std::integral_constant<int, 3>());
  if (rows == 2) add_rows(std::integral_constant<int, 2>());
  if (rows == 1) add_rows(std::integral_constant<int, 1>());
  CONVEXT_UNROLL
  for (int r = 0; r < kTapRows; ++r) {
    CONVEXT_UNROLL
    for (int k = 0; k < kTapColumns; ++k) {
      const int64_t tap = (plane * t.tap_row_count + row + r) * t.tap_column_count + first + k;
      T* out = t.lane_sums + tap * kPlaneLanes;
      V total[kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        total[v] = t.accumulate ? add(V::load(out + v * V::lanes), sum[r][k][v]) : sum[r][k][v];
        if (!t.totals) total[v].store(out + v * V::lanes);
      }
      if (!t.totals) continue;
      CONVEXT_UNROLL
      for (int half = kVectors / 2; half > 0; half /= 2) {
        CONVEXT_UNROLL
        for (int v = 0; v < half; ++v) total[v] = add(total[v], total[v + half]);
      }
      t.totals[tap] = sum_lanes(total[0]);
    }
  }
}

template <class T>
void depthwise_plane_weights(const DepthwisePlanes<T>& tile) {
  const DepthwisePlanes<T> t = tile;
  constexpr TapColumns on = TapColumns::on, halved = TapColumns::halved;
  const bool three = t.tap_column_count == 3;
  const TapColumns columns = tap_columns_of(t);
  // All at once where there are registers for so many sums.
  const bool all = kPlaneTapRows == 3 && three && t.tap_row_count == 3;
  for (int64_t plane = 0; plane < t.planes; ++plane) {
    if constexpr (kPlaneTapRows == 3) {
      if (all && columns == on && t.source_row == t.tap_row) {
        plane_taps<T, 3, 3, 1, on>(t, plane, 0, 0);
        continue;
      }
      if (all && columns == halved && t.source_row == 2 * t.tap_row) {
        plane_taps<T, 3, 3, 2, halved>(t, plane, 0, 0);
        continue;
      }
    }
    for (int64_t row = 0; row < t.tap_row_count; ++row) {
      if (three && columns == on) {
        plane_taps<T, 1, 3, 1, on>(t, plane, row, 0);
      } else if (three && columns == halved) {
        plane_taps<T, 1, 3, 1, halved>(t, plane, row, 0);
      } else {
        for (int64_t k = 0; k < t.tap_column_count; ++k)
          plane_taps<T, 1, 1, 1, on>(t, plane, row, k);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Moving rows

template <class T, bool kSplit>
void copy_rows(const PlanesCopy<T>& copy) {
  using V = Vec<T>;
  const PlanesCopy<T> c = copy;
  constexpr int64_t kStep = kSplit ? 2 * V::lanes : V::lanes;
  const int64_t whole = c.columns / kStep * kStep;
  const int rest = int(c.columns - whole);
  const int rest_low = rest < V::lanes ? rest : V::lanes, rest_high = rest - rest_low;
  for (int64_t plane = 0; plane < c.planes; ++plane) {
    const T* from = c.from + plane * c.from_plane;
    T* to = c.to + plane * c.to_plane;
    for (int64_t row = 0; row < c.rows; ++row, from += c.from_row, to += c.to_row) {
      if constexpr (kSplit) {
        for (int64_t i = 0; i < whole; i += kStep) {
          V low = V::load(from + i), high = V::load(from + i + V::lanes);
          deinterleave(low, high);
          low.store(to + i / 2);
          high.store(to + c.odd + i / 2);
        }
        if (rest == 0) continue;
        V low = V::load_first(from + whole, rest_low), high = V::zero();
        if (rest_high) high = V::load_first(from + whole + V::lanes, rest_high);
        deinterleave(low, high);
        low.store(to + whole / 2);
        high.store(to + c.odd + whole / 2);
      } else {
        for (int64_t i = 0; i < whole; i += kStep) V::load(from + i).store(to + i);
        if (rest) V::load_first(from + whole, rest).store(to + whole);
      }
    }
  }
}

template <class T>
void copy_planes(const PlanesCopy<T>& copy) {
  copy.odd ? copy_rows<T, true>(copy) : copy_rows<T, false>(copy);
}

// The inverse of a split into two phases.
template <class T>
void interleave_rows(const T* even, const T* odd, int64_t ld_from, T* to, int64_t ld_to,
                     int64_t rows, int64_t cols) {
  using V = Vec<T>;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + 2 * V::lanes <= cols; c += 2 * V::lanes) {
      V low = V::load(even + c / 2), high = V::load(odd + c / 2);
      interleave(low, high);
      low.store(to + c);
      high.store(to + c + V::lanes);
    }
    if (c < cols) {
      const int rest = int(cols - c), more = rest - V::lanes;
      V low = V::load(even + c / 2), high = V::load(odd + c / 2);
      interleave(low, high);
      low.store_first(to + c, more < 0 ? rest : V::lanes);
      if (more > 0) high.store_first(to + c + V::lanes, more);
    }
    even += ld_from;
    odd += ld_from;
    to += ld_to;
  }
}
