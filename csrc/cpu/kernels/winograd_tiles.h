// Winograd's transforms of tiles (see WinogradTiles). Included by tiles.h.
//
// The matrices are those of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
// (2016), but for the points at which F(4x4, 3x3) evaluates polynomials: 0, +-3/4, +-3/2 and
// infinity in place of 0, +-1, +-2 and infinity. Their constants too are exact in float, they take
// as many operations, and the error is a third (see Barabasz, Anderson, Soodhalter and Gregg,
// "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks",
// 2020, on the choice of points).
#pragma once

// Linear maps of a column or row of a tile, each a matrix of the paper. Fused multiply-adds in a
// fixed order, so that every ISA rounds alike.
template <int kSize>
struct Winograd;

template <>
struct Winograd<2> {
  // B^T
  struct Input {
    static constexpr int in = 4, out = 4;
    template <class V>
    CONVEXT_INLINE static void apply(const V* d, V* to) {
      to[0] = sub(d[0], d[2]);
      to[1] = add(d[1], d[2]);
      to[2] = sub(d[2], d[1]);
      to[3] = sub(d[3], d[1]);
    }
  };
  // A^T
  struct Output {
    static constexpr int in = 4, out = 2;
    template <class V>
    CONVEXT_INLINE static void apply(const V* m, V* to) {
      to[0] = add(m[0], add(m[1], m[2]));
      to[1] = add(m[3], sub(m[1], m[2]));
    }
  };
  // A
  struct OutputGrad {
    static constexpr int in = 2, out = 4;
    template <class V>
    CONVEXT_INLINE static void apply(const V* y, V* to) {
      to[0] = y[0];
      to[1] = add(y[0], y[1]);
      to[2] = sub(y[0], y[1]);
      to[3] = y[1];
    }
  };
  // G
  struct Filter {
    static constexpr int in = 3, out = 4;
    template <class V>
    CONVEXT_INLINE static void apply(const V* g, V* to) {
      const V half = V::broadcast(0.5);
      const V even = mul(half, add(g[0], g[2])), odd = mul(half, g[1]);
      to[0] = g[0];
      to[1] = add(even, odd);
      to[2] = sub(even, odd);
      to[3] = g[2];
    }
  };
  // G^T
  struct FilterGrad {
    static constexpr int in = 4, out = 3;
    template <class V>
    CONVEXT_INLINE static void apply(const V* u, V* to) {
      const V half = V::broadcast(0.5);
      const V even = mul(half, add(u[1], u[2])), odd = mul(half, sub(u[1], u[2]));
      to[0] = add(u[0], even);
      to[1] = odd;
      to[2] = add(u[3], even);
    }
  };
};

template <>
struct Winograd<4> {
  static constexpr double a = 0.75, b = 1.5;
  static constexpr double a2 = a * a, b2 = b * b;
  // The denominators of Lagrange's polynomials: products of a point's distances to the others.
  static constexpr double at_0 = 1 / (a2 * b2);
  static constexpr double at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

  struct Input {
    static constexpr int in = 6, out = 6;
    template <class V>
    CONVEXT_INLINE static void apply(const V* d, V* to) {
      const V product = V::broadcast(a2 * b2), minus_sum = V::broadcast(-(a2 + b2));
      const V minus_a2 = V::broadcast(-a2), minus_b2 = V::broadcast(-b2);
      const V even_a = fma(minus_b2, d[2], d[4]), odd_a = fma(minus_b2, d[1], d[3]);
      const V even_b = fma(minus_a2, d[2], d[4]), odd_b = fma(minus_a2, d[1], d[3]);
      to[0] = fma(product, d[0], fma(minus_sum, d[2], d[4]));
      to[1] = fma(V::broadcast(a), odd_a, even_a);
      to[2] = fma(V::broadcast(-a), odd_a, even_a);
      to[3] = fma(V::broadcast(b), odd_b, even_b);
      to[4] = fma(V::broadcast(-b), odd_b, even_b);
      to[5] = fma(product, d[1], fma(minus_sum, d[3], d[5]));
    }
  };
  struct Output {
    static constexpr int in = 6, out = 4;
    template <class V>
    CONVEXT_INLINE static void apply(const V* m, V* to) {
      const V even_a = add(m[1], m[2]), odd_a = sub(m[1], m[2]);
      const V even_b = add(m[3], m[4]), odd_b = sub(m[3], m[4]);
      to[0] = add(m[0], add(even_a, even_b));
      to[1] = fma(V::broadcast(b), odd_b, mul(V::broadcast(a), odd_a));
      to[2] = fma(V::broadcast(b2), even_b, mul(V::broadcast(a2), even_a));
      to[3] = fma(V::broadcast(b2 * b), odd_b, fma(V::broadcast(a2 * a), odd_a, m[5]));
    }
  };
  struct OutputGrad {
    static constexpr int in = 4, out = 6;
    template <class V>
    CONVEXT_INLINE static void apply(const V* y, V* to) {
      const V even_a = fma(V::broadcast(a2), y[2], y[0]);
      const V even_b = fma(V::broadcast(b2), y[2], y[0]);
      const V odd_a = fma(V::broadcast(a2), y[3], y[1]);
      const V odd_b = fma(V::broadcast(b2), y[3], y[1]);
      to[0] = y[0];
      to[1] = fma(V::broadcast(a), odd_a, even_a);
      to[2] = fma(V::broadcast(-a), odd_a, even_a);
      to[3] = fma(V::broadcast(b), odd_b, even_b);
      to[4] = fma(V::broadcast(-b), odd_b, even_b);
      to[5] = y[3];
    }
  };
  struct Filter {
    static constexpr int in = 3, out = 6;
    template <class V>
    CONVEXT_INLINE static void apply(const V* g, V* to) {
      const V even_a = mul(V::broadcast(at_a), fma(V::broadcast(a2), g[2], g[0]));
      const V even_b = mul(V::broadcast(at_b), fma(V::broadcast(b2), g[2], g[0]));
      to[0] = mul(V::broadcast(at_0), g[0]);
      to[1] = fma(V::broadcast(a * at_a), g[1], even_a);
      to[2] = fma(V::broadcast(-a * at_a), g[1], even_a);
      to[3] = fma(V::broadcast(b * at_b), g[1], even_b);
      to[4] = fma(V::broadcast(-b * at_b), g[1], even_b);
      to[5] = g[2];
    }
  };
  struct FilterGrad {
    static constexpr int in = 6, out = 3;
    template <class V>
    CONVEXT_INLINE static void apply(const V* u, V* to) {
      const V even_a = mul(V::broadcast(at_a), add(u[1], u[2]));
      const V even_b = mul(V::broadcast(at_b), add(u[3], u[4]));
      const V odd_a = mul(V::broadcast(a * at_a), sub(u[1], u[2]));
      to[0] = fma(V::broadcast(at_0), u[0], add(even_a, even_b));
      to[1] = fma(V::broadcast(b * at_b), sub(u[3], u[4]), odd_a);
      to[2] = fma(V::broadcast(b2), even_b, fma(V::broadcast(a2), even_a, u[5]));
    }
  };
};

// One vector of columns, from column c on; `last` counts the lanes used where kPartial. Of the
// results, only those of one row where kRow is not negative. The strides are held in locals, which
// stores through T* cannot change.
template <class T, class Map, bool kFromImage, bool kToImage, bool kPartial, int kRow>
CONVEXT_INLINE void winograd_tile(const WinogradTiles<T>& t, int64_t tile, int64_t c, int last) {
  using V = Vec<T>;
  constexpr int kIn = Map::in, kOut = Map::out;
  constexpr bool kAccumulates = !kFromImage && !kToImage && kOut == 3;  // filter_grad
  const int64_t from_stride = t.from.plane_stride, to_stride = t.to.plane_stride;
  // Of the tile after the next, whose pixels are asked for now: few channels are too short a run of
  // memory for the hardware to foresee.
  const int64_t ahead = tile + 2 < t.count ? tile + 2 : t.count - 1;
  const T* const* from_pixels = kFromImage ? t.from.pixels + tile * kIn * kIn : nullptr;
  const T* const* from_ahead = kFromImage ? t.from.pixels + ahead * kIn * kIn : nullptr;
  T* const* to_pixels = kToImage ? t.to.pixels + tile * kOut * kOut : nullptr;
  T* const* to_ahead = kToImage ? t.to.pixels + ahead * kOut * kOut : nullptr;
  const int64_t pixel = c + t.first_pixel;
  const T* from = kFromImage ? nullptr : t.from.planes + tile * t.from.tile_stride + c;
  T* to = kToImage ? nullptr : t.to.planes + tile * t.to.tile_stride + c;
  const V bias = kToImage && t.bias ? V::load(t.bias + c) : V::zero();
  // The compiler would keep a tile's pointers, which are more than there are registers, on the
  // stack from one c to the next, at more instructions than they cost here.
  if constexpr (kFromImage) asm("" : "+r"(from_pixels), "+r"(from_ahead));
  if constexpr (kToImage) asm("" : "+r"(to_pixels), "+r"(to_ahead));
  V half[kOut][kIn];
  CONVEXT_UNROLL
  for (int x = 0; x < kIn; ++x) {
    V column[kIn], mapped[kOut];
    CONVEXT_UNROLL
    for (int y = 0; y < kIn; ++y) {
      const int i = y * kIn + x;
      if constexpr (kFromImage) {
        const T* p = from_pixels[i] + pixel;
        // Of overlapping tiles, the first two rows and columns are the neighbours' too.
        if (kIn < kOut || (x >= 2 && y >= 2)) prefetch(from_ahead[i] + pixel);
        column[y] = kPartial ? V::load_first(p, last) : V::load(p);
      } else {
        column[y] = V::load(from + i * from_stride);
      }
    }
    Map::apply(column, mapped);
    CONVEXT_UNROLL
    for (int y = 0; y < kOut; ++y) half[y][x] = mapped[y];
  }
  CONVEXT_UNROLL
  for (int y = 0; y < kOut; ++y) {
    if (kRow >= 0 && y != kRow) continue;
    V mapped[kOut];
    Map::apply(half[y], mapped);
    CONVEXT_UNROLL
    for (int x = 0; x < kOut; ++x) {
      const int i = y * kOut + x;
      if constexpr (kToImage) {
        T* p = to_pixels[i] + pixel;
        prefetch_to_write(to_ahead[i] + pixel);
        const V result = add(mapped[x], bias);
        if constexpr (kPartial) {
          T lanes[V::lanes];
          result.store(lanes);
          std::memcpy(p, lanes, last * sizeof(T));
        } else {
          result.store(p);
        }
      } else {
        T* p = to + (kRow >= 0 ? x : i) * to_stride;
        if (kAccumulates && t.accumulate) mapped[x] = add(V::load(p), mapped[x]);
        mapped[x].store(p);
      }
    }
  }
}

template <class T, class Map, bool kFromImage, bool kToImage, int kRow = -1>
void winograd_tiles(const WinogradTiles<T>& t) {
  constexpr int kLanes = Vec<T>::lanes;
  const int64_t whole = t.cols - t.cols % kLanes;
  for (int64_t tile = 0; tile < t.count; ++tile) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      winograd_tile<T, Map, kFromImage, kToImage, false, kRow>(t, tile, c, 0);
    }
    if (whole < t.cols) {
      winograd_tile<T, Map, kFromImage, kToImage, true, kRow>(t, tile, whole, int(t.cols - whole));
    }
  }
}

template <class T, class Map, int kRow>
void winograd_filter_row(const WinogradTiles<T>& t) {
  if constexpr (kRow < Map::out) {
    if (t.row == kRow) return winograd_tiles<T, Map, false, false, kRow>(t);
    winograd_filter_row<T, Map, kRow + 1>(t);
  }
}

template <class T, int kSize>
void winograd_sized(const WinogradTiles<T>& t) {
  using W = Winograd<kSize>;
  switch (t.map) {
    case WinogradMap::input:
      return winograd_tiles<T, typename W::Input, true, false>(t);
    case WinogradMap::output:
      return winograd_tiles<T, typename W::Output, false, true>(t);
    case WinogradMap::output_grad:
      return winograd_tiles<T, typename W::OutputGrad, true, false>(t);
    case WinogradMap::filter:
      if (t.row >= 0) return winograd_filter_row<T, typename W::Filter, 0>(t);
      return winograd_tiles<T, typename W::Filter, false, false>(t);
    case WinogradMap::filter_grad:
      return winograd_tiles<T, typename W::FilterGrad, false, false>(t);
  }
}

template <class T>
void winograd(const WinogradTiles<T>& t) {
  t.size == 4 ? winograd_sized<T, 4>(t) : winograd_sized<T, 2>(t);
}
