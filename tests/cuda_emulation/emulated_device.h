// INTERIM, over the prototype: the emulator's own version replaces it.
#pragma once
#include "cuda/kernels/stream.h"
#include "emu.h"
namespace convext::cuda {
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emu::cur->blk->smem);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, Stream, const A&... args) {
  emu::launch(kernel, grid, block, smem, args...);
}
template <int kBytes>
void copy_async(void* to, const void* from, int valid) {
  emu::async_copy(to, from, valid, kBytes);
}
inline void commit_copies() {
  emu::async_commit();
}
template <int N>
void wait_for_copies() {
  emu::async_wait(N);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_AT) {
  emu::mma_16x8x16(d, a, b, std::is_same_v<T, __nv_bfloat16>, EMU_SITE);
}
inline uint32_t to_tf32(float value) {
  uint32_t b;
  memcpy(&b, &value, 4);
  if ((b & 0x7f800000) != 0x7f800000) b += 0x1000;
  return b & ~0x1fffu;
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             EMU_AT) {
  struct In {
    uint32_t a[4], b[2];
  } in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, other;
  auto* c = emu::exchange(~0u, &in, sizeof in, false, EMU_SITE);
  const int lane = emu::cur->lane;
  auto f = [](uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      memcpy(&other, emu::slot(c, row % 8 * 4 + k % 4), sizeof other);
      const float x = f(other.a[row / 8 + k / 4 * 2]);
      memcpy(&other, emu::slot(c, column * 4 + k % 4), sizeof other);
      sum += x * f(other.b[k / 4]);
    }
    d[e] += sum;
  }
  emu::leave(c);
}
template <bool kTransposed = false>
void load_matrices(uint32_t (&r)[4], const void* row, EMU_AT) {
  auto* c = emu::exchange(~0u, &row, sizeof row, false, EMU_SITE);
  const int l = emu::cur->lane;
  for (int i = 0; i < 4; ++i) {
    const char* p;
    if (kTransposed) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        memcpy(&p, emu::slot(c, i * 8 + l % 4 * 2 + e), sizeof p);
        memcpy(&pair[e], p + l / 4 * 2, 2);
      }
      memcpy(&r[i], pair, 4);
    } else {
      memcpy(&p, emu::slot(c, i * 8 + (l >> 2)), sizeof p);
      if ((uintptr_t)p & 15) emu::fail("ldmatrix: a row address is not 16-byte aligned");
      memcpy(&r[i], p + (l & 3) * 4, 4);
    }
  }
  emu::leave(c);
}
}  // namespace convext::cuda
