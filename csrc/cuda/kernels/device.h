// What CUDA kernels are written against: the few instructions that C++ has no words for, and a
// launch. Under nvcc they are PTX. Any other compiler finds emulated_device.h instead, which is in
// tests/cuda_emulation, and with it runs the very same kernels on a CPU.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels/stream.h"

namespace convext::cuda {

// The shared memory that the launch asked for, as much as it asked for.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char convext_dynamic_shared[];
  return reinterpret_cast<T*>(convext_dynamic_shared);
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); throws what the runtime reports.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  }
  if (error == cudaSuccess) {
    // clang-format off
    kernel<<<grid, block, shared_bytes, stream>>>(Parameters(arguments)...);
    // clang-format on
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("convext: a CUDA kernel was not launched: ") +
                             cudaGetErrorString(error));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// --------------------------------------------------------------------------------------------------
// Asynchronous copies to shared memory, sm_80. `valid` bytes are read, the rest becomes zeros; both
// addresses are multiples of kBytes, which is 4, 8 or 16. Where nothing is valid the source need
// not be readable, but must be some address.

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  __trap();  // not reached: the host asks the device first
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the kLatest groups of this thread have landed. Other threads see them after a
// barrier.
template <int kLatest>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
#endif
}

// --------------------------------------------------------------------------------------------------
// Tensor cores, one warp together, sm_80: d (16 x 8, float) += a (16 x k) times b (k x 8). Which
// element lies in which lane is in the PTX ISA, "Matrix fragments for mma.m16n8k16" and "m16n8k8".

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  __trap();
#endif
}

// Operands are floats that to_tf32 has rounded, in registers' bits.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// To the nearest of 10 bits of mantissa, ties away from zero (cvt.rna.tf32.f32).
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  __trap();
#endif
  return bits;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, sm_75. Lane i gives the address, a
// multiple of 16, of row i % 8 of matrix i / 8, and receives two neighbours of each matrix:
// elements 2 * (i % 4) and the next of row i / 4, or of column i / 4 where transposed.
template <bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

}  // namespace convext::cuda

#endif  // __CUDACC__
