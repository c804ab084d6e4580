// mma.sync and ldmatrix, by whole products of matrices; rounding to tf32.
#include <cmath>
#include <cstring>

#include "probe.h"

namespace probes {
namespace {

constexpr int kM = 16, kN = 8, kK = 16;

// c (16 x 8) = a b, with a as (m, k) or transposed as (k, m), b as (k, n) or as (n, k).
template <class T, bool kTransposedA, bool kTransposedB>
__global__ void product(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T a_shared[16 * 16], b_shared[16 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a_shared[i] = a[i];
  for (int i = lane; i < 256; i += 32) b_shared[i] = i < kK * kN ? b[i] : T();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  // Matrices of a: (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
  const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8, k = matrix / 2 * 8;
  if (kTransposedA) {
    load_matrices<true>(fragment_a, &a_shared[(k + lane % 8) * kM + matrix % 2 * 8]);
  } else {
    load_matrices(fragment_a, &a_shared[row * kK + k]);
  }
  // Of b: k 0-7 and k 8-15; the other two are not used.
  const int half = matrix % 2 * 8;
  if (kTransposedB) {
    load_matrices(fragment_b, &b_shared[lane % 8 * kK + half]);  // (n, k)
  } else {
    load_matrices<true>(fragment_b, &b_shared[(half + lane % 8) * kN]);  // (k, n)
  }
  float d[4] = {1, 1, 1, 1};
  const uint32_t two[2] = {fragment_b[0], fragment_b[1]};
  mma_m16n8k16<T>(d, fragment_a, two);
  mma_m16n8k16<T>(d, fragment_a, two);
  for (int e = 0; e < 4; ++e) {
    c[(lane / 4 + e / 2 * 8) * kN + lane % 4 * 2 + e % 2] = d[e];
  }
}

template <class T, bool kTransposedA, bool kTransposedB>
void check_product() {
  Buffer<T> a(kM * kK), b(kK * kN);
  Buffer<float> c(kM * kN);
  fill(a, 1);
  fill(b, 2);
  launch(product<T, kTransposedA, kTransposedB>, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(),
         c.data());
  finish();
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0;
      for (int k = 0; k < kK; ++k) {
        sum += to_float(a[kTransposedA ? k * kM + m : m * kK + k]) *
               to_float(b[kTransposedB ? n * kK + k : k * kN + n]);
      }
      expect(c[m * kN + n] == 1 + 2 * sum, "a product", m * kN + n);
    }
  }
}

template <class T>
void check_products() {
  check_product<T, false, false>();
  check_product<T, false, true>();
  check_product<T, true, false>();
  check_product<T, true, true>();
}

PROBE(mma_float16) {
  check_products<__half>();
}

PROBE(mma_bfloat16) {
  check_products<__nv_bfloat16>();
}

// PTX ISA, "Matrix fragments for mma.m16n8k8": lane = 4 * group + in_group holds of a
// (group, in_group), (group + 8, in_group), (group, in_group + 4), (group + 8, in_group + 4); of b
// (in_group, group), (in_group + 4, group).
__global__ void product_tf32(const float* a, const float* b, float* c, bool round) {
  const int lane = threadIdx.x, group = lane / 4, in_group = lane % 4;
  const auto bits = [&](float value) {
    uint32_t raw;
    memcpy(&raw, &value, 4);
    return round ? to_tf32(value) : raw;
  };
  const uint32_t fragment_a[4] = {
      bits(a[group * 8 + in_group]), bits(a[(group + 8) * 8 + in_group]),
      bits(a[group * 8 + in_group + 4]), bits(a[(group + 8) * 8 + in_group + 4])};
  const uint32_t fragment_b[2] = {bits(b[in_group * 8 + group]),
                                  bits(b[(in_group + 4) * 8 + group])};
  float d[4] = {};
  mma_m16n8k8_tf32(d, fragment_a, fragment_b);
  for (int e = 0; e < 4; ++e) {
    c[(group + e / 2 * 8) * 8 + in_group * 2 + e % 2] = d[e];
  }
}

PROBE(mma_tf32) {
  Buffer<float> a(16 * 8), b(8 * 8), c(16 * 8);
  fill(a, 3);
  fill(b, 4);
  launch(product_tf32, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), c.data(), true);
  finish();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[m * 8 + k] * b[k * 8 + n];
      expect(c[m * 8 + n] == sum, "a product", m * 8 + n);
    }
  }
  // 1 + 3 / 4096 lies between 1 and 1 + 4 / 4096, which tf32 has: rounded up, or cut off.
  for (bool round : {true, false}) {
    for (int i = 0; i < 128; ++i) a[i] = i % 8 == 0 ? 1 + 3.0f / 4096 : 0;
    for (int i = 0; i < 64; ++i) b[i] = 1;
    launch(product_tf32, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), c.data(), round);
    finish();
    for (int i = 0; i < 128; ++i) expect(c[i] == (round ? 1 + 4.0f / 4096 : 1), "10 bits", i);
  }
}

__global__ void to_tf32s(const float* in, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = to_tf32(in[i]);
}

// To 10 bits after the leading one, ties away from zero.
PROBE(to_tf32) {
  Buffer<float> in(4096);
  Buffer<uint32_t> out(4096);
  for (int i = 0; i < 4096; ++i) {
    const float mantissa = 1 + float(i % 1024) / 8192 + float(i % 3) / 65536;
    in[i] = std::ldexp(i % 2 ? -mantissa : mantissa, i % 61 - 30);
  }
  launch(to_tf32s, dim3(1), dim3(64), 0, nullptr, in.data(), out.data(), 4096);
  finish();
  for (int i = 0; i < 4096; ++i) {
    int exponent;
    const double mantissa = std::frexp(double(in[i]), &exponent);
    const double rounded = std::ldexp(std::round(std::ldexp(mantissa, 11)), exponent - 11);
    float got;
    std::memcpy(&got, &out[i], 4);
    expect(double(got) == rounded, "rounding", i);
  }
}

}  // namespace
}  // namespace probes
