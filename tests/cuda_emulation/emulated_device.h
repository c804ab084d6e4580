// csrc/cuda/kernels/device.h by the emulator: the same names, which are explained there.
#pragma once

#include <tuple>

#include "cuda/kernels/stream.h"
#include "cuda_language.h"

namespace convext::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::current->block->shared);
}

// The grid of a launch, and where that is.
struct Grid {
  template <class T>
  Grid(const T& size, CONVEXT_PLACE) : size(size), place(place) {}

  dim3 size;
  emulator::Place place;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  };
  const Call call{kernel, {Parameters(arguments)...}};
  emulator::run(
      [](const void* argument) {
        const auto& call = *static_cast<const Call*>(argument);
        std::apply(call.kernel, call.parameters);
      },
      &call, grid.size, block, shared_bytes, grid.place);
}

template <int kBytes>
void copy_async(void* to, const void* from, int valid, CONVEXT_PLACE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(to, from, valid, kBytes, place);
}

inline void commit_copies() {
  emulator::commit_copies();
}

template <int kLatest>
void wait_for_copies() {
  emulator::wait_for_copies(kLatest);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CONVEXT_PLACE) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto kFactor =
      std::is_same_v<T, __half> ? emulator::Factor::float16 : emulator::Factor::bfloat16;
  emulator::multiply_matrices(kFactor, d, a, b, place);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             CONVEXT_PLACE) {
  emulator::multiply_matrices(emulator::Factor::tf32, d, a, b, place);
}

inline uint32_t to_tf32(float value) {
  return emulator::round_to_tf32(value);
}

template <bool kTransposed = false>
void load_matrices(uint32_t (&matrices)[4], const void* row, CONVEXT_PLACE) {
  emulator::load_matrices(matrices, row, kTransposed, place);
}

}  // namespace convext::cuda
