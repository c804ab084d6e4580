// The vector type in portable C++. Every operation rounds as the vector units do (std::fma is one
// rounding), so that results agree to the bit with the other ISAs wherever the order of sums
// agrees. Included by isa_scalar.cpp only.
#pragma once

template <class T>
struct Vec {
  static constexpr int lanes = 4;
  T v[lanes];

  static Vec zero() { return broadcast(T(0)); }
  static Vec broadcast(T x) { return {{x, x, x, x}}; }
  static Vec load(const T* p) { return {{p[0], p[1], p[2], p[3]}}; }
  // The first n lanes, and zeros in the others; reads no memory past them.
  static Vec load_first(const T* p, int n) {
    Vec x = zero();
    for (int i = 0; i < n; ++i) x.v[i] = p[i];
    return x;
  }
  void store(T* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
  }
  void store_first(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  for (int i = 0; i < Vec<T>::lanes; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return c;
}

template <class T>
inline Vec<T> add(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] += b.v[i];
  return a;
}

template <class T>
inline Vec<T> sub(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] -= b.v[i];
  return a;
}

template <class T>
inline Vec<T> mul(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] *= b.v[i];
  return a;
}

// The first n lanes, and zeros in the others.
template <class T>
inline Vec<T> first_lanes(Vec<T> a, int n) {
  for (int i = n; i < Vec<T>::lanes; ++i) a.v[i] = T(0);
  return a;
}

// max(a, 0), and NaN where a is.
template <class T>
inline Vec<T> relu(Vec<T> a) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = a.v[i] < 0 ? T(0) : a.v[i];
  return a;
}

// a, with zeros where gate <= 0.
template <class T>
inline Vec<T> keep_positive(Vec<T> a, Vec<T> gate) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = gate.v[i] <= 0 ? T(0) : a.v[i];
  return a;
}

// The sum of all lanes, the two halves being added to each other again and again.
template <class T>
inline T sum_lanes(Vec<T> a) {
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}

// The even and the odd elements of the two vectors, one after the other.
template <class T>
inline void deinterleave(Vec<T>& low, Vec<T>& high) {
  const Vec<T> a = low, b = high;
  constexpr int kHalf = Vec<T>::lanes / 2;
  for (int i = 0; i < kHalf; ++i) {
    low.v[i] = a.v[2 * i], low.v[kHalf + i] = b.v[2 * i];
    high.v[i] = a.v[2 * i + 1], high.v[kHalf + i] = b.v[2 * i + 1];
  }
}

// The inverse.
template <class T>
inline void interleave(Vec<T>& even, Vec<T>& odd) {
  const Vec<T> a = even, b = odd;
  constexpr int kHalf = Vec<T>::lanes / 2;
  for (int i = 0; i < kHalf; ++i) {
    even.v[2 * i] = a.v[i], even.v[2 * i + 1] = b.v[i];
    odd.v[2 * i] = a.v[kHalf + i], odd.v[2 * i + 1] = b.v[kHalf + i];
  }
}

// Converts as many leading elements as vectors cover; the rest is the caller's.
inline int64_t load_vectors(DType, const uint16_t*, float*, int64_t) {
  return 0;
}
inline int64_t store_vectors(const float*, DType, uint16_t*, int64_t) {
  return 0;
}

// Rows of the register tiles.
constexpr int kMostVectors = 2;
constexpr int kGatherRows[4] = {4, 2};
constexpr int kMultiplyRows[2] = {4, 2};
constexpr int kGemmRows = 4, kGemmVectors = 1;
constexpr int kPanelRows = 4, kPanelVectors = 1;
constexpr int kDepthwisePixels = 2, kDepthwiseVectors = 1;
constexpr int kPlaneRows = 2, kPlaneVectors = 1, kPlaneTapRows = 1;
