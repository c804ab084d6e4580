// What the bulk copies of sm_90 (TMA) move, described on the host. The terms are those of the
// driver's cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col; axis 0 is the one whose elements are
// neighbours.
#pragma once

#include <cstdint>

namespace convext::cuda {

// tf32 rounds floats on their way.
enum class MapElement { float16, bfloat16, float32, tf32 };

// How 16-byte pieces of rows change places in shared memory, so that neither rows nor columns meet
// in the same banks: the rows have 32, 64 or 128 bytes. The values are those of a wgmma descriptor.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

constexpr uint32_t row_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::none ? 16 : 256u >> uint32_t(swizzle);
}

struct MapTensor {
  MapElement element;
  Swizzle swizzle;
  const void* base;  // a multiple of 16
  int rank;          // up to 5
  uint64_t size[5];
  uint64_t stride[5];  // in bytes; that of axis 0 is not read, others are multiples of 16
  uint32_t step[5];  // elements from one that is copied to the next: 1 but for strided convolutions
};

// A box of elements; what lies outside of the tensor is zeros.
struct MapBox {
  uint32_t size[5];
};

// Pixels of an (N, H, W, C) tensor in the order of a convolution's outputs: along W, H and N, by
// the tensor's steps, between `lower` and size - 1 + `upper` for axes W and H (0 and 1). A copy
// says at which of them it begins and what is added to W and H, that is, which tap it is for.
struct MapPixels {
  int lower[2], upper[2];
  uint32_t channels, pixels;
};

}  // namespace convext::cuda
