// The two products of a depthwise convolution (see DepthwiseTile). Lanes run across channels, so
// that source, weight and pixel are whole vectors and nothing is broadcast. Loads are what bounds
// them: neighbouring pixels meet the same sources, which are loaded once where the steps allow it.
// Included by tiles.h.
#pragma once

// kVectors adjacent vectors of channels, of which the last has only `last` lanes where kPart.
template <class T, int kVectors, bool kPart>
struct DepthwiseVectors {
  int last;

  CONVEXT_INLINE Vec<T> load(const T* p, int v) const {
    p += v * Vec<T>::lanes;
    return kPart && v == kVectors - 1 ? Vec<T>::load_first(p, last) : Vec<T>::load(p);
  }
  CONVEXT_INLINE void store(Vec<T> x, T* p, int v) const {
    p += v * Vec<T>::lanes;
    if (kPart && v == kVectors - 1) {
      x.store_first(p, last);
    } else {
      x.store(p);
    }
  }
};

// Calls body(vectors, channel) for the channels in pieces of kVectors vectors, and what is left in
// pieces of one, the last of which may be a part of one.
template <class T, int kVectors, class Body>
inline void for_channel_vectors(int64_t channels, const Body& body) {
  constexpr int64_t kLanes = Vec<T>::lanes;
  int64_t channel = 0;
  if constexpr (kVectors > 1) {
    for (; channel + kVectors * kLanes <= channels; channel += kVectors * kLanes) {
      body(DepthwiseVectors<T, kVectors, false>{0}, channel);
    }
  }
  for (; channel + kLanes <= channels; channel += kLanes) {
    body(DepthwiseVectors<T, 1, false>{0}, channel);
  }
  if (channel < channels) body(DepthwiseVectors<T, 1, true>{int(channels - channel)}, channel);
}

// ---------------------------------------------------------------------------------------------------
// depthwise_pixels

// kPixels neighbours in a row, any taps.
template <class T, int kPixels, int kVectors, bool kPart>
struct DepthwiseRow {
  static CONVEXT_INLINE void add_taps(const DepthwiseTile<T>& t,
                                      DepthwiseVectors<T, kVectors, kPart> vectors, const T* source,
                                      const T* weights, Vec<T> (&sum)[kPixels][kVectors]) {
    for (int64_t column = 0; column < t.tap_columns; ++column) {
      Vec<T> weight[kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) weight[v] = vectors.load(weights, v);
      CONVEXT_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sum[p][v] = fma(vectors.load(source + p * t.source_column, v), weight[v], sum[p][v]);
        }
      }
      source += t.tap_column;
      weights += t.weight_column;
    }
  }
};

// kPixels neighbours that meet kTaps taps in a row, neighbouring pixels kStride taps apart.
template <int kTaps, int kStride>
struct DepthwiseWindow {
  template <class T, int kPixels, int kVectors, bool kPart>
  struct Row {
    static CONVEXT_INLINE void add_taps(const DepthwiseTile<T>& t,
                                        DepthwiseVectors<T, kVectors, kPart> vectors,
                                        const T* source, const T* weights,
                                        Vec<T> (&sum)[kPixels][kVectors]) {
      Vec<T> weight[kTaps][kVectors];
      CONVEXT_UNROLL
      for (int k = 0; k < kTaps; ++k) {
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          weight[k][v] = vectors.load(weights + k * t.weight_column, v);
        }
      }
      CONVEXT_UNROLL
      for (int i = 0; i < (kPixels - 1) * kStride + kTaps; ++i, source += t.tap_column) {
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T> x = vectors.load(source, v);
          CONVEXT_UNROLL
          for (int p = 0; p < kPixels; ++p) {
            const int k = i - p * kStride;
            if (k >= 0 && k < kTaps) sum[p][v] = fma(x, weight[k][v], sum[p][v]);
          }
        }
      }
    }
  };
};

// What some channels of a row of pixels are computed from.
template <class T>
struct DepthwisePlace {
  const T *source, *weight;
  T* pixel;
  const T* init;
};

// kPixels neighbours at a time, `groups` of them; Row adds a row of taps.
template <class T, template <class, int, int, bool> class Row, int kPixels, int kVectors,
          bool kPart>
CONVEXT_INLINE void depthwise_columns(const DepthwiseTile<T>& t,
                                      DepthwiseVectors<T, kVectors, kPart> vectors,
                                      DepthwisePlace<T> at, int64_t groups) {
  using V = Vec<T>;
  const int64_t source_column = t.source_column, pixel_column = t.pixel_column;
  for (int64_t group = 0; group < groups; ++group) {
    const T* source = at.source;
    const T* weights = at.weight;
    const T* init = at.init;
    bool accumulate = t.accumulate;
    int64_t tap_row = 0;
    do {
      V sum[kPixels][kVectors];
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V start = init ? vectors.load(init, v) : V::zero();
        CONVEXT_UNROLL
        for (int p = 0; p < kPixels; ++p) sum[p][v] = start;
      }
      const int64_t rest = t.tap_rows - tap_row;
      const int64_t end = rest < t.chain_rows ? t.tap_rows : tap_row + t.chain_rows;
      for (; tap_row < end; ++tap_row, source += t.tap_row, weights += t.weight_row) {
        Row<T, kPixels, kVectors, kPart>::add_taps(t, vectors, source, weights, sum);
      }
      CONVEXT_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        T* out = at.pixel + p * pixel_column;
        CONVEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          vectors.store(accumulate ? add(vectors.load(out, v), sum[p][v]) : sum[p][v], out, v);
        }
      }
      init = nullptr;
      accumulate = true;
    } while (tap_row < t.tap_rows);
    at.source += kPixels * source_column;
    at.pixel += kPixels * pixel_column;
  }
}

// Calls the instance for groups of this many pixels, 1 to kMost.
template <class T, template <class, int, int, bool> class Row, int kMost, int kVectors, bool kPart>
CONVEXT_INLINE void depthwise_dispatch(const DepthwiseTile<T>& t, int64_t pixels,
                                       DepthwiseVectors<T, kVectors, kPart> vectors,
                                       DepthwisePlace<T> at, int64_t groups) {
  if constexpr (kMost > 1) {
    if (pixels < kMost) {
      return depthwise_dispatch<T, Row, kMost - 1>(t, pixels, vectors, at, groups);
    }
  }
  depthwise_columns<T, Row, kMost>(t, vectors, at, groups);
}

// Asks for what the next row will be the first to read, and where it will be written.
template <class T>
CONVEXT_INLINE void prefetch_next_row(const DepthwiseTile<T>& t, const T* source, T* pixel,
                                      int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto each_line = [&](int64_t step, const auto& body) {
    // Pixels next to each other are one piece.
    const bool together = step == t.channels;
    const int64_t pieces = together ? 1 : columns, length = together ? columns * step : t.channels;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      for (int64_t i = 0; i < length; i += kLine) body(piece * step + i);
    }
  };
  source += t.source_row + (t.tap_row > 0 ? (t.tap_rows - 1) * t.tap_row : 0);
  each_line(t.source_column, [&](int64_t i) { prefetch(source + i); });
  if (t.source_row == 2 * t.tap_row) {
    each_line(t.source_column, [&](int64_t i) { prefetch(source - t.tap_row + i); });
  }
  pixel += t.pixel_row;
  each_line(t.pixel_column, [&](int64_t i) { prefetch_to_write(pixel + i); });
}

template <class T, template <class, int, int, bool> class Row>
void depthwise_rectangle(const DepthwiseTile<T>& tile) {
  constexpr int64_t kTile = 2 * kDepthwisePixels;  // so few that sources are read as streams
  const DepthwiseTile<T> t = tile;                 // a copy, which no store can change
  const int64_t tiles = ceil_div(t.columns, kTile), most = ceil_div(t.columns, tiles);
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int64_t first = 0; first < t.columns; first += most) {
      const int64_t columns = t.columns - first < most ? t.columns - first : most;
      const int64_t pixels = ceil_div(columns, ceil_div(columns, int64_t(kDepthwisePixels)));
      const int64_t groups = columns / pixels, rest = columns % pixels;
      const T* source = t.source + row * t.source_row + first * t.source_column;
      T* pixel = t.pixel + row * t.pixel_row + first * t.pixel_column;
      prefetch_next_row(t, source, pixel, columns);
      for_channel_vectors<T, kDepthwiseVectors>(t.channels, [&](auto vectors, int64_t channel) {
        DepthwisePlace<T> at{source + channel, t.weight + channel, pixel + channel,
                             t.init ? t.init + channel : nullptr};
        depthwise_dispatch<T, Row, kDepthwisePixels>(t, pixels, vectors, at, groups);
        if (rest == 0) return;
        at.source += groups * pixels * t.source_column;
        at.pixel += groups * pixels * t.pixel_column;
        depthwise_dispatch<T, Row, kDepthwisePixels>(t, rest, vectors, at, 1);
      });
    }
  }
}

template <class T>
void depthwise_pixels(const DepthwiseTile<T>& tile) {
  DepthwiseTile<T> t = tile;
  // From the other end, where later taps would otherwise meet earlier pixels' sources.
  if ((t.tap_column < 0) != (t.source_column < 0)) {
    t.source += (t.columns - 1) * t.source_column;
    t.pixel += (t.columns - 1) * t.pixel_column;
    t.source_column = -t.source_column;
    t.pixel_column = -t.pixel_column;
  }
  // The usual kernels and strides; 2 taps are what a stride of 2 leaves of 3 in backward_input.
  if (t.columns >= 3) {
    if (t.source_column == t.tap_column) {
      if (t.tap_columns == 2) return depthwise_rectangle<T, DepthwiseWindow<2, 1>::template Row>(t);
      if (t.tap_columns == 3) return depthwise_rectangle<T, DepthwiseWindow<3, 1>::template Row>(t);
      if (t.tap_columns == 5) return depthwise_rectangle<T, DepthwiseWindow<5, 1>::template Row>(t);
    } else if (t.source_column == 2 * t.tap_column) {
      if (t.tap_columns == 3) return depthwise_rectangle<T, DepthwiseWindow<3, 2>::template Row>(t);
      if (t.tap_columns == 5) return depthwise_rectangle<T, DepthwiseWindow<5, 2>::template Row>(t);
    }
  }
  depthwise_rectangle<T, DepthwiseRow>(t);
}

// ---------------------------------------------------------------------------------------------------
// depthwise_weights

// Adds the products of kPixels neighbours to the sums of kRows x kColumns taps. Neighbouring pixels
// are kStride taps apart, or kPixels is 1.
template <class T, int kRows, int kColumns, int kPixels, int kStride, bool kPart>
CONVEXT_INLINE void add_depthwise_pixels(const DepthwiseTile<T>& t,
                                         DepthwiseVectors<T, 1, kPart> vectors, const T* source,
                                         const T* pixel, Vec<T> (&sum)[kRows][kColumns]) {
  Vec<T> y[kPixels];
  CONVEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) y[p] = vectors.load(pixel + p * t.pixel_column, 0);
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const T* from = source + r * t.tap_row;
    CONVEXT_UNROLL
    for (int i = 0; i < (kPixels - 1) * kStride + kColumns; ++i, from += t.tap_column) {
      const Vec<T> x = vectors.load(from, 0);
      CONVEXT_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int k = i - p * kStride;
        if (k >= 0 && k < kColumns) sum[r][k] = fma(x, y[p], sum[r][k]);
      }
    }
  }
}

// All pixels of kRows x kColumns taps. Neighbouring pixels are kStride taps apart, or it is 0.
template <class T, int kRows, int kColumns, int kStride, bool kPart>
void depthwise_taps(const DepthwiseTile<T>& t, DepthwiseVectors<T, 1, kPart> vectors,
                    const T* source, const T* pixel, T* weight) {
  constexpr int kPixels = 4;
  Vec<T> sum[kRows][kColumns];
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CONVEXT_UNROLL
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<T>::zero();
  }
  for (int64_t row = 0; row < t.rows; ++row) {
    const T* from = source + row * t.source_row;
    const T* y = pixel + row * t.pixel_row;
    int64_t column = 0;
    if constexpr (kStride > 0) {
      for (; column + kPixels <= t.columns; column += kPixels) {
        add_depthwise_pixels<T, kRows, kColumns, kPixels, kStride>(t, vectors, from, y, sum);
        from += kPixels * t.source_column;
        y += kPixels * t.pixel_column;
      }
    }
    for (; column < t.columns; ++column) {
      add_depthwise_pixels<T, kRows, kColumns, 1, 1>(t, vectors, from, y, sum);
      from += t.source_column;
      y += t.pixel_column;
    }
  }
  CONVEXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CONVEXT_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      T* out = weight + r * t.weight_row + c * t.weight_column;
      vectors.store(add(vectors.load(out, 0), sum[r][c]), out, 0);
    }
  }
}

template <class T>
void depthwise_weights(const DepthwiseTile<T>& t) {
  static_assert(kDepthwiseTaps == 3);
  const auto with = [](int64_t number, const auto& body) {
    if (number == 1) return body(std::integral_constant<int, 1>());
    if (number == 2) return body(std::integral_constant<int, 2>());
    return body(std::integral_constant<int, 3>());
  };
  const auto with_stride = [&t](const auto& body) {
    const bool many = t.columns >= 4;
    if (many && t.source_column == t.tap_column) return body(std::integral_constant<int, 1>());
    if (many && t.source_column == 2 * t.tap_column) return body(std::integral_constant<int, 2>());
    return body(std::integral_constant<int, 0>());
  };
  with(t.tap_rows, [&](auto rows) {
    with(t.tap_columns, [&](auto columns) {
      with_stride([&](auto stride) {
        for_channel_vectors<T, 1>(t.channels, [&](auto vectors, int64_t channel) {
          depthwise_taps<T, rows.value, columns.value, stride.value>(
              t, vectors, t.source + channel, t.pixel + channel, t.weight + channel);
        });
      });
    });
  });
}
