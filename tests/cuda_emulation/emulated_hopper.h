// csrc/cuda/kernels/hopper.h by the emulator: the same names, which are explained there.
#pragma once

#include <algorithm>

#include "cuda_language.h"
#include "hopper.h"

namespace convext::cuda {

using emulator::TensorMap;

inline TensorMap make_tensor_map(const MapTensor& tensor, const MapBox& box, CONVEXT_PLACE) {
  return emulator::make_tensor_map(tensor, &box, nullptr, place);
}
inline TensorMap make_tensor_map(const MapTensor& tensor, const MapPixels& pixels, CONVEXT_PLACE) {
  return emulator::make_tensor_map(tensor, nullptr, &pixels, place);
}

inline void init_mbarrier(uint64_t* barrier, uint32_t arrivals, CONVEXT_PLACE) {
  emulator::init_mbarrier(barrier, arrivals, place);
}
inline void publish_mbarriers() {}
inline void arrive(uint64_t* barrier, CONVEXT_PLACE) {
  emulator::arrive_at_mbarrier(barrier, 0, place);
}
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes, CONVEXT_PLACE) {
  emulator::arrive_at_mbarrier(barrier, bytes, place);
}
inline void wait_for_phase(uint64_t* barrier, uint32_t parity, CONVEXT_PLACE) {
  emulator::wait_for_phase(barrier, parity, place);
}
inline void named_barrier(int number, int threads, CONVEXT_PLACE) {
  emulator::barrier(number, threads, false, place);
}
inline void fence_shared_for_async() {}

template <int kRank>
void load_box(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[kRank],
              CONVEXT_PLACE) {
  static_assert(kRank >= 2 && kRank <= 4);
  emulator::load_box(to, map, barrier, kRank, at, place);
}
inline void load_pixels(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[4],
                        uint16_t w, uint16_t h, CONVEXT_PLACE) {
  emulator::load_pixels(to, map, barrier, at, w, h, place);
}

struct Tf32 {};

inline void fence_products() {
  emulator::fence_products();
}
inline void commit_products() {
  emulator::commit_products();
}
template <int kLatest>
void wait_for_products(CONVEXT_PLACE) {
  emulator::wait_for_products(kLatest, place);
}

template <class T, int kColumns, bool kTransposedA = false, bool kTransposedB = false>
void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add, CONVEXT_PLACE) {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256);
  constexpr auto kFactor = std::is_same_v<T, __half>          ? emulator::Factor::float16
                           : std::is_same_v<T, __nv_bfloat16> ? emulator::Factor::bfloat16
                                                              : emulator::Factor::tf32;
  emulator::issue_product({kFactor, kColumns, kTransposedA, kTransposedB, a, b, add}, d, place);
}

inline uint32_t shared_address(const void* pointer, CONVEXT_PLACE) {
  return emulator::shared_address(pointer, place);
}

}  // namespace convext::cuda
