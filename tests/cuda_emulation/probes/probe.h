// Small kernels that try one instruction each against plain loops, and kernels with one mistake
// each beside their healthy twins. tests/test_cuda_emulator.py runs them by the emulator; nvcc
// compiles the same files, and the program that comes out confirms on a GPU what the emulator makes
// of the PTX ISA:
//
//   nvcc -std=c++20 -arch=sm_90a --expt-relaxed-constexpr -Icsrc tests/cuda_emulation/probes/*.cu
//   ./a.out all
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/kernels/device.h"

namespace probes {

using namespace convext::cuda;

// From a float to an element and back, on the host too; what is tried is exact.
template <class T>
__host__ __device__ T to_element(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}
__host__ __device__ inline float to_float(float value) {
  return value;
}
__host__ __device__ inline float to_float(__half value) {
  return __half2float(value);
}
__host__ __device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// A probe by its name; of a fault, `broken` chooses between the mistake and its twin.
struct Probe {
  const char* name;
  bool fault;
  void (*run)(bool broken);
};

inline std::vector<Probe>& all_probes() {
  static std::vector<Probe> probes;
  return probes;
}

struct Registered {
  Registered(const char* name, bool fault, void (*run)(bool)) {
    all_probes().push_back({name, fault, run});
  }
};

#define PROBE(name)                                                                \
  static void probe_##name(bool);                                                  \
  static const ::probes::Registered registered_##name{#name, false, probe_##name}; \
  static void probe_##name(bool)
#define FAULT(name)                                                               \
  static void fault_##name(bool broken);                                          \
  static const ::probes::Registered registered_##name{#name, true, fault_##name}; \
  static void fault_##name(bool broken)

// Memory that host and kernels see.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
#ifdef __CUDACC__
    if (cudaMallocManaged(&data_, count * sizeof(T)) != cudaSuccess) std::abort();
#else
    data_ = static_cast<T*>(std::malloc(count * sizeof(T)));  // aligned to 16
#endif
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

// Until kernels are done.
inline void finish() {
#ifdef __CUDACC__
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
#endif
}

inline void expect(bool right, const char* what, size_t at = 0) {
  if (right) return;
  std::fprintf(stderr, "wrong result: %s, at %zu\n", what, at);
  std::exit(1);
}

// Small whole numbers, whose products and sums are exact in every type.
template <class T>
void fill(Buffer<T>& buffer, unsigned seed) {
  for (size_t i = 0; i < buffer.size(); ++i) {
    seed = seed * 1664525u + 1013904223u;
    buffer[i] = to_element<T>(float(int(seed >> 24) % 7 - 3));
  }
}

}  // namespace probes
