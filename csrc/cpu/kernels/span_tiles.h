// Sums and maps over spans of columns that share their parameters (see SpanSums and SpanMap): the
// vector code of batch norm where a channel of an image fills vectors by itself. Included by
// tiles.h.
#pragma once

// Bytes from what is read or written to what is fetched into the cache.
constexpr int64_t kBytesAhead = 2048;

// Lane j of the sums, pairwise: every half is added to the other. In this order whatever the length
// of a vector.
template <class T>
CONVEXT_INLINE T sum_span_lanes(Vec<T>* lanes) {
  int vectors = kSpanLanes / Vec<T>::lanes;
  CONVEXT_UNROLL
  for (; vectors > 1; vectors /= 2) {
    CONVEXT_UNROLL
    for (int v = 0; v < vectors / 2; ++v) lanes[v] = add(lanes[v], lanes[v + vectors / 2]);
  }
  return sum_lanes(lanes[0]);
}

// Elements of every span that are summed up in one chain: full times kSpanLanes, and a rest, of
// which vector v has rest[v].
template <class T>
struct SpanPart {
  static constexpr int kVectors = kSpanLanes / Vec<T>::lanes;
  int64_t begin, full;
  int rest[kVectors];
  bool has_rest;

  SpanPart(int64_t begin, int64_t length) : begin(begin), full(length / kSpanLanes) {
    const int left = int(length % kSpanLanes);
    has_rest = left > 0;
    for (int v = 0; v < kVectors; ++v) {
      const int lanes = left - v * Vec<T>::lanes;
      rest[v] = lanes < 0 ? 0 : lanes > Vec<T>::lanes ? Vec<T>::lanes : lanes;
    }
  }
};

template <class T, ColumnSum kKind>
CONVEXT_INLINE void sum_span_chain(const SpanSums<T>& s, const SpanPart<T>& part, int64_t row,
                                   int64_t rows, int64_t span) {
  using V = Vec<T>;
  constexpr int kVectors = SpanPart<T>::kVectors;
  constexpr int64_t kAhead = kBytesAhead / sizeof(T);
  constexpr bool kGated = kKind == ColumnSum::gated_product;
  const V shift = kKind == ColumnSum::total ? V::zero() : V::broadcast(s.shift[span]);
  const V scale = kGated ? V::broadcast(s.scale[span]) : V::zero();
  const V offset = kGated ? V::broadcast(s.offset[span]) : V::zero();
  V sum[kVectors], dot[kVectors];
  CONVEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) sum[v] = dot[v] = V::zero();
  const int64_t first = row * s.ld + span * s.distance + part.begin, ld = s.ld;
  const T* a = s.a + first;
  const T* b = s.b + first;
  for (int64_t r = 0; r < rows; ++r, a += ld, b += ld) {
    const T* left = a;
    const T* right = b;
    for (int64_t i = 0; i < part.full; ++i, left += kSpanLanes, right += kSpanLanes) {
      CONVEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = v * V::lanes;
        prefetch(left + at + kAhead);
        if constexpr (reads_two(kKind)) prefetch(right + at + kAhead);
        add_to_sums<T, kKind>(V::load(left + at),
                              reads_two(kKind) ? V::load(right + at) : V::zero(), shift, scale,
                              offset, sum[v], dot[v]);
      }
    }
    if (!part.has_rest) continue;
    // Lanes without an element take zeros, and a shift of zero.
    CONVEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int n = part.rest[v];
      const int64_t at = v * V::lanes;
      add_to_sums<T, kKind>(V::load_first(left + at, n),
                            reads_two(kKind) ? V::load_first(right + at, n) : V::zero(),
                            first_lanes(shift, n), scale, offset, sum[v], dot[v]);
    }
  }
  s.sum[span] += sum_span_lanes<T>(sum);
  if constexpr (kKind != ColumnSum::total) s.dot[span] += sum_span_lanes<T>(dot);
}

template <class T, ColumnSum kKind>
void sum_spans(const SpanSums<T>& s) {
  constexpr int64_t kLongest = kSumChain * kSpanLanes;
  const int64_t chain_rows = span_chain_rows(s.length);
  for (int64_t begin = 0; begin < s.length; begin += kLongest) {
    const int64_t left = s.length - begin;
    const SpanPart<T> part(begin, left < kLongest ? left : kLongest);
    for (int64_t row = 0; row < s.rows; row += chain_rows) {
      const int64_t rows = s.rows - row < chain_rows ? s.rows - row : chain_rows;
      for (int64_t span = 0; span < s.spans; ++span) {
        sum_span_chain<T, kKind>(s, part, row, rows, span);
      }
    }
  }
}

template <class T>
void span_sums(const SpanSums<T>& s) {
  with_sum_kind(s.kind, [&](auto kind) { sum_spans<T, decltype(kind)::value>(s); });
}

template <class T, ColumnMapKind kKind>
void map_spans(const SpanMap<T>& m) {
  using V = Vec<T>;
  constexpr int kLine = 64 / int(sizeof(T));
  constexpr int64_t kAhead = kBytesAhead / sizeof(T);
  const int64_t length = m.length;
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t span = 0; span < m.spans; ++span) {
      MapTile<T, kKind> tile;
      tile.set(m, [&](const T* from) { return V::broadcast(from[span]); });
      const int64_t first = r * m.ld + span * m.distance;
      const T* x = m.x + first;
      const T* grad = m.grad + first;
      T* out = m.out + first;
      int64_t i = 0;
      for (; i + kLine <= length; i += kLine) {
        prefetch_to_write(out + i + kAhead);
        CONVEXT_UNROLL
        for (int v = 0; v < kLine; v += V::lanes) tile.map(x + i + v, grad + i + v, out + i + v);
      }
      for (; i + V::lanes <= length; i += V::lanes) tile.map(x + i, grad + i, out + i);
      // Writes some elements twice, with the same values.
      if (i < length) {
        i = length - V::lanes;
        tile.map(x + i, grad + i, out + i);
      }
    }
  }
}

template <class T>
void span_map(const SpanMap<T>& m) {
  with_map_kind(m.kind, [&](auto kind) { map_spans<T, decltype(kind)::value>(m); });
}
