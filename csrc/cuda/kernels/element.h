// Element types in kernels: how they are read, summed and rounded, and from a DType to one.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/types.h"
#include "cuda/kernels/device.h"

namespace convext::cuda {

// The type in which products of T are summed.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// To the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(Sum<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// a * b + c, rounded once.
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}

// Calls f with a value of the element type, for its type: f(__half()).
template <class F>
void with_element_of(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return std::forward<F>(f)(float());
    case DType::float64:
      return std::forward<F>(f)(double());
    case DType::bfloat16:
      return std::forward<F>(f)(__nv_bfloat16());
    case DType::float16:
      return std::forward<F>(f)(__half());
  }
}

}  // namespace convext::cuda
