// CUDA's words for a compiler that does not know them, done by the emulator. A kernel that needs a
// word more finds that it is not declared.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__)
// That sanitizer guards ordinary variables only; all blocks then run on one OS thread.
#define __shared__ static
#else
// A block stays on its OS thread.
#define __shared__ static thread_local
#endif

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->block->index)
#define blockDim (::emulator::current->block->size)
#define gridDim (::emulator::current->block->grid)
#define warpSize 32

#define CONVEXT_PLACE ::emulator::Place place = ::emulator::Place::current()

// --------------------------------------------------------------------------------------------------
// Barriers

inline void __syncthreads(CONVEXT_PLACE) {
  emulator::barrier(0, emulator::current->block->threads, false, place);
}
inline int __syncthreads_count(int predicate, CONVEXT_PLACE) {
  return emulator::barrier(0, emulator::current->block->threads, predicate != 0, place);
}
inline int __syncthreads_or(int predicate, CONVEXT_PLACE) {
  return emulator::barrier(0, emulator::current->block->threads, predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, CONVEXT_PLACE) {
  return emulator::barrier(0, emulator::current->block->threads, predicate == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, CONVEXT_PLACE) {
  emulator::warp_barrier(mask, place);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// --------------------------------------------------------------------------------------------------
// Warps

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CONVEXT_PLACE) {
  const int first = emulator::current->lane & ~(width - 1);
  emulator::shuffle(mask, &value, sizeof value, first | (source & (width - 1)), place);
  return value;
}
// Lanes that would read beyond their part of the warp keep their own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CONVEXT_PLACE) {
  const int lane = emulator::current->lane, source = lane - int(by);
  const bool inside = source >= (lane & ~(width - 1));
  emulator::shuffle(mask, &value, sizeof value, inside ? source : lane, place);
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CONVEXT_PLACE) {
  const int lane = emulator::current->lane, source = lane + int(by);
  const bool inside = source <= (lane | (width - 1));
  emulator::shuffle(mask, &value, sizeof value, inside ? source : lane, place);
  return value;
}
// Here a lane may read parts before its own, not those after it.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, CONVEXT_PLACE) {
  const int lane = emulator::current->lane, source = lane ^ by;
  const bool inside = source <= (lane | (width - 1));
  emulator::shuffle(mask, &value, sizeof value, inside ? source : lane, place);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CONVEXT_PLACE) {
  return emulator::ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, CONVEXT_PLACE) {
  return emulator::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CONVEXT_PLACE) {
  return emulator::ballot(mask, predicate == 0, place) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CONVEXT_PLACE) {
  return emulator::match_any(mask, &value, sizeof value, place);
}
// Which lanes are active is up to the hardware, moment by moment; no kernel may build on it.
unsigned __activemask() = delete;

// --------------------------------------------------------------------------------------------------
// Atomics, on integers: the order in which floats were added would change the sum.

namespace emulator {

template <class T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

// *address = next(*address), in one step, since a fiber is not interrupted and OS threads retry.
template <class T, class Next>
T atomic_update(T* address, Next next) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, next(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace emulator

template <emulator::AtomicInteger T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, [=](T old) { return T(old + value); });
}
template <emulator::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <emulator::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <emulator::AtomicInteger T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, [=](T) { return value; });
}
template <emulator::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emulator::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}
template <class T>
  requires(!emulator::AtomicInteger<T>)
T atomicAdd(T*, std::type_identity_t<T>) = delete;

// --------------------------------------------------------------------------------------------------
// Loads, stores, arithmetic

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fmaf(a, b, c);
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline int __clz(int bits) {
  return std::countl_zero(unsigned(bits));
}
inline int __ffs(int bits) {
  return bits ? std::countr_zero(unsigned(bits)) + 1 : 0;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((uint64_t(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline void __trap() {
  emulator::fail("__trap()");
}
