// sm_90 in the emulator: barriers in shared memory, bulk copies, products of a warpgroup.
#pragma once

#include "cuda/kernels/tensor_map.h"
#include "emulator.h"

namespace emulator {

// --------------------------------------------------------------------------------------------------
// mbarriers: mbarrier.cpp

void init_mbarrier(uint64_t* barrier, uint32_t arrivals, Place);
void arrive_at_mbarrier(uint64_t* barrier, uint32_t expected_bytes, Place);
void wait_for_phase(uint64_t* barrier, bool parity, Place);
// Where a copy is issued that the barrier's phase waits for, and where its bytes have come.
void announce_bytes(uint64_t* barrier, Place);
void complete_bytes(uint64_t* barrier, uint32_t bytes, Place);

// --------------------------------------------------------------------------------------------------
// Bulk copies: tensor_copies.cpp. Late ones land when no thread can go on.

struct TensorMap {
  uint32_t mark;  // tells a map that was made from other memory
  convext::cuda::MapTensor tensor;
  bool of_pixels;
  convext::cuda::MapBox box;
  convext::cuda::MapPixels pixels;

  int element_bytes() const;
  uint32_t inner_bytes() const;  // of a row of the box, or a pixel
  uint32_t bytes() const;        // of the whole box
};

struct TensorCopy {
  TensorMap map;
  unsigned char* to;
  uint64_t* barrier;
  int at[5];
  int offset[2];
  Thread* thread;  // that issued it
  Place place;
};

TensorMap make_tensor_map(const convext::cuda::MapTensor&, const convext::cuda::MapBox*,
                          const convext::cuda::MapPixels*, Place);
void load_box(void* to, const TensorMap&, uint64_t* barrier, int rank, const int* at, Place);
void load_pixels(void* to, const TensorMap&, uint64_t* barrier, const int* at, int w, int h, Place);
void land(const TensorCopy&);

// The address that hardware would give: dynamic shared memory begins after the 1 KiB that it keeps.
constexpr uint32_t kDynamicSharedAddress = 1024;
uint32_t shared_address(const void*, Place);
// Where the 16 bytes at an address lie, under a swizzle.
uint32_t swizzled(uint32_t address, convext::cuda::Swizzle);

// --------------------------------------------------------------------------------------------------
// Products of a warpgroup: warpgroup.cpp. The last thread to issue one, or to wait for one, acts
// for all 128.

struct Product {
  Factor factor;
  int columns;
  bool transposed_a, transposed_b;
  uint64_t a, b;  // descriptors
  bool add;
};

void fence_products();
void issue_product(const Product&, float* d, Place);
void commit_products();
void wait_for_products(int latest, Place);

}  // namespace emulator
