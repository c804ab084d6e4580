// The instructions of sm_90a: barriers in shared memory, bulk copies that tell them of their bytes,
// and products of a warpgroup. As device.h: PTX under nvcc, elsewhere the emulator. A kernel that
// uses them has a body for CONVEXT_SM90A only, and the host asks the device first.
#pragma once

#include <cstdint>

#include "cuda/kernels/device.h"
#include "cuda/kernels/tensor_map.h"

// Defined, too, where no code for a device is made: on nvcc's host side and by the emulator.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONVEXT_SM90A 1
#endif

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include <cudaTypedefs.h>

namespace convext::cuda {

using TensorMap = CUtensorMap;  // a parameter of kernels: const __grid_constant__ TensorMap

namespace hopper_detail {

// The driver's function of that name; the library does not link the driver.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("convext: the CUDA driver has no ") + name);
  }
  return reinterpret_cast<Function*>(found);
}

inline CUtensorMapDataType type_of(MapElement element) {
  switch (element) {
    case MapElement::float16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case MapElement::bfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case MapElement::float32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
}

inline CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::bytes32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::bytes64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::bytes128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

inline void check(CUresult result) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("convext: the CUDA driver refuses a tensor map");
  }
}

}  // namespace hopper_detail

inline TensorMap make_tensor_map(const MapTensor& t, const MapBox& box) {
  static auto* const encode =
      hopper_detail::driver_function<std::remove_pointer_t<PFN_cuTensorMapEncodeTiled_v12000> >(
          "cuTensorMapEncodeTiled");
  TensorMap map;
  hopper_detail::check(
      encode(&map, hopper_detail::type_of(t.element), cuuint32_t(t.rank), const_cast<void*>(t.base),
             reinterpret_cast<const cuuint64_t*>(t.size),
             reinterpret_cast<const cuuint64_t*>(t.stride + 1), box.size, t.step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, hopper_detail::swizzle_of(t.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

inline TensorMap make_tensor_map(const MapTensor& t, const MapPixels& pixels) {
  static auto* const encode =
      hopper_detail::driver_function<std::remove_pointer_t<PFN_cuTensorMapEncodeIm2col_v12000> >(
          "cuTensorMapEncodeIm2col");
  TensorMap map;
  hopper_detail::check(
      encode(&map, hopper_detail::type_of(t.element), cuuint32_t(t.rank), const_cast<void*>(t.base),
             reinterpret_cast<const cuuint64_t*>(t.size),
             reinterpret_cast<const cuuint64_t*>(t.stride + 1), pixels.lower, pixels.upper,
             pixels.channels, pixels.pixels, t.step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             hopper_detail::swizzle_of(t.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

// --------------------------------------------------------------------------------------------------
// Barriers. An mbarrier's phase ends when as many threads have arrived as it was made for and all
// bytes that they expected have come; the next begins at once. Phases have parity 0, 1, 0, ...

__device__ __forceinline__ void init_mbarrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// After the last init_mbarrier, before the __syncthreads that tells the other threads.
__device__ __forceinline__ void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Barrier 1 to 15 of the block, for as many threads as are named, whole warps.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Between ordinary writes to shared memory and bulk copies or products that read them.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --------------------------------------------------------------------------------------------------
// Bulk copies to shared memory, issued by one thread. The destination is a multiple of 128, or of
// the 256, 512 or 1024 within which a swizzle of 32, 64 or 128 bytes repeats. The barrier must
// expect the bytes of the whole box, with those that are zeros.

template <int kRank>
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, uint64_t* barrier,
                                         const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 4);
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}

// at: c, w, h, n of the first pixel; (w, h): what is added to its place.
__device__ __forceinline__ void load_pixels(void* to, const TensorMap& map, uint64_t* barrier,
                                            const int (&at)[4], uint16_t w, uint16_t h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "h"(w), "h"(h)
      : "memory");
}

// --------------------------------------------------------------------------------------------------
// Products of a warpgroup, 128 threads together: d (64 x kColumns) = or += a (64 x k) times b (k x
// kColumns), k being 16, for Tf32 8. Thread t holds, of row t / 32 * 16 + t % 32 / 4 + e / 2 % 2 *
// 8, column e / 4 * 8 + t % 4 * 2 + e % 2, as d[e]. No thread touches d until the product was
// waited for.

struct Tf32 {};

// Before the first product, and after d was touched.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the kLatest groups are done.
template <int kLatest>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLatest) : "memory");
}

#define CONVEXT_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CONVEXT_R16(i) CONVEXT_R4(i), CONVEXT_R4(i + 4), CONVEXT_R4(i + 8), CONVEXT_R4(i + 12)
#define CONVEXT_R32(i) CONVEXT_R16(i), CONVEXT_R16(i + 16)
#define CONVEXT_R64(i) CONVEXT_R32(i), CONVEXT_R32(i + 32)
// The names of ten operands, and of those before 30, 60, 90 and 120.
#define CONVEXT_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define CONVEXT_30 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," CONVEXT_TEN(1) CONVEXT_TEN(2)
#define CONVEXT_60 CONVEXT_30 CONVEXT_TEN(3) CONVEXT_TEN(4) CONVEXT_TEN(5)
#define CONVEXT_90 CONVEXT_60 CONVEXT_TEN(6) CONVEXT_TEN(7) CONVEXT_TEN(8)
#define CONVEXT_120 CONVEXT_90 CONVEXT_TEN(9) CONVEXT_TEN(10) CONVEXT_TEN(11)
// `names` are those of d's operands; after them come a, b, whether to add, and which are
// transposed.
#define CONVEXT_WGMMA(shape, names, a_, b_, add_, flags, ...)                          \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_                            \
               ", 0;\nwgmma.mma_async.sync.aligned." shape " {" names "}, " a_ ", " b_ \
               ", add, 1, 1" flags ";\n}"                                              \
               : __VA_ARGS__                                                           \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposedA)), "n"(int(kTransposedB)))
#define CONVEXT_WGMMAS(columns, names, a_, b_, add_, transposed_a_, transposed_b_, ...)      \
  if constexpr (kColumns == columns && std::is_same_v<T, __half>) {                          \
    CONVEXT_WGMMA("m64n" #columns "k16.f32.f16.f16", names, a_, b_, add_,                    \
                  ", " transposed_a_ ", " transposed_b_, __VA_ARGS__);                       \
  } else if constexpr (kColumns == columns && std::is_same_v<T, __nv_bfloat16>) {            \
    CONVEXT_WGMMA("m64n" #columns "k16.f32.bf16.bf16", names, a_, b_, add_,                  \
                  ", " transposed_a_ ", " transposed_b_, __VA_ARGS__);                       \
  } else if constexpr (kColumns == columns) {                                                \
    CONVEXT_WGMMA("m64n" #columns "k8.f32.tf32.tf32", names, a_, b_, add_, "", __VA_ARGS__); \
  }

// a and b are described by matrix_in_shared. T is __half, __nv_bfloat16 or Tf32, whose operands are
// floats and cannot be transposed. In memory a row of a, or a column of b, is along k; of what is
// transposed, a column of a, or a row of b, along m or n.
template <class T, int kColumns, bool kTransposedA = false, bool kTransposedB = false>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                         bool add) {
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 96 ||
                kColumns == 128 || kColumns == 192 || kColumns == 256);
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> ||
                (std::is_same_v<T, Tf32> && !kTransposedA && !kTransposedB));
#ifdef CONVEXT_SM90A
  CONVEXT_WGMMAS(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", "%10", "%11", "%12", CONVEXT_R4(0),
                 CONVEXT_R4(4))
  CONVEXT_WGMMAS(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16", "%17", "%18",
                 "%19", "%20", CONVEXT_R16(0))
  CONVEXT_WGMMAS(64, CONVEXT_30 "%30,%31", "%32", "%33", "%34", "%35", "%36", CONVEXT_R32(0))
  CONVEXT_WGMMAS(96, CONVEXT_30 CONVEXT_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47", "%48", "%49",
                 "%50", "%51", "%52", CONVEXT_R32(0), CONVEXT_R16(32))
  CONVEXT_WGMMAS(128, CONVEXT_60 "%60,%61,%62,%63", "%64", "%65", "%66", "%67", "%68",
                 CONVEXT_R64(0))
  CONVEXT_WGMMAS(192, CONVEXT_90 "%90,%91,%92,%93,%94,%95", "%96", "%97", "%98", "%99", "%100",
                 CONVEXT_R64(0), CONVEXT_R32(64))
  CONVEXT_WGMMAS(256, CONVEXT_120 "%120,%121,%122,%123,%124,%125,%126,%127", "%128", "%129", "%130",
                 "%131", "%132", CONVEXT_R64(0), CONVEXT_R64(64))
#else
  __trap();
#endif
}

#undef CONVEXT_R4
#undef CONVEXT_R16
#undef CONVEXT_R32
#undef CONVEXT_R64
#undef CONVEXT_TEN
#undef CONVEXT_30
#undef CONVEXT_60
#undef CONVEXT_90
#undef CONVEXT_120
#undef CONVEXT_WGMMA
#undef CONVEXT_WGMMAS

}  // namespace convext::cuda

#endif  // __CUDACC__

namespace convext::cuda {

// The descriptor of an operand of multiply() that begins at `first` in dynamic shared memory. Its
// pieces are 16 bytes wide, T elements, and 8 of them that follow each other across (rows of a row
// major operand, k of a transposed one) lie row_bytes(swizzle) apart. Then, in bytes,
//   not transposed: group_bytes from 8 rows to the next 8; piece_bytes from a piece to the next
//   along k
//     without a swizzle, with one they are neighbours, and the argument is not read;
//   transposed: group_bytes from 8 along k to the next 8, and piece_bytes from row_bytes(swizzle)
//   along
//     m or n to the next; without a swizzle the other way round.
// PTX ISA, "Strides" of wgmma's shared memory; the canonical layouts are listed in CUTLASS's
// cute/atom/mma_traits_sm90_gmma.hpp.
__device__ __forceinline__ uint64_t matrix_in_shared(const void* first, Swizzle swizzle,
                                                     uint32_t group_bytes,
                                                     uint32_t piece_bytes = 16) {
  return uint64_t(shared_address(first) >> 4 & 0x3fff) | uint64_t(piece_bytes >> 4 & 0x3fff) << 16 |
         uint64_t(group_bytes >> 4 & 0x3fff) << 32 | uint64_t(swizzle) << 62;
}

}  // namespace convext::cuda
