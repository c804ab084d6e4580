// Kernels with one mistake each. Where one is not reported by itself, it makes the result wrong.
#include "cuda/kernels/hopper.h"
#include "probe.h"

namespace probes {
namespace {

constexpr int kThreads = 64;

// Thread i writes s[i] and reads s[63 - i].
__global__ void reverse(float* out, bool barrier) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  s[t] = float(t);
  if (barrier) __syncthreads();
  out[blockIdx.x * kThreads + t] = s[kThreads - 1 - t];
}

FAULT(missing_syncthreads) {
  Buffer<float> out(2 * kThreads);
  launch(reverse, dim3(2), dim3(kThreads), 0, nullptr, out.data(), !broken);
  finish();
  for (int i = 0; i < 2 * kThreads; ++i) expect(out[i] == float(63 - i % 64), "reversed", i);
}

// The neighbour's number, in a warp.
__global__ void neighbours(float* out, bool barrier) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  s[t] = float(t);
  if (barrier) __syncwarp();
  out[t] = s[t ^ 1];
}

FAULT(missing_syncwarp) {
  Buffer<float> out(32);
  launch(neighbours, dim3(1), dim3(32), 0, nullptr, out.data(), !broken);
  finish();
  for (int i = 0; i < 32; ++i) expect(out[i] == float(i ^ 1), "neighbours", i);
}

// A loop whose next turn overwrites what slower threads still read.
__global__ void turns(float* out, bool barrier) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  float sum = 0;
  for (int turn = 0; turn < 4; ++turn) {
    s[t] = float(t + turn);
    __syncthreads();
    sum += s[kThreads - 1 - t];
    if (barrier) __syncthreads();
  }
  out[t] = sum;
}

FAULT(missing_second_syncthreads) {
  Buffer<float> out(kThreads);
  launch(turns, dim3(1), dim3(kThreads), 0, nullptr, out.data(), !broken);
  finish();
  for (int i = 0; i < kThreads; ++i) expect(out[i] == float(4 * (63 - i) + 6), "sums", i);
}

enum class CopyMistake { none, no_wait, waits_for_too_few, no_barrier, misaligned };

__global__ void copies(const float* in, float* out, CopyMistake mistake) {
  __shared__ __align__(16) float s[2][4 * kThreads];
  const int t = threadIdx.x;
  const int shift = mistake == CopyMistake::misaligned;
  for (int i = 0; i < 2; ++i) {
    copy_async<16>(&s[i][4 * t], in + 4 * (i * kThreads + t) + shift, 16);
    commit_copies();
  }
  if (mistake == CopyMistake::waits_for_too_few) {
    wait_for_copies<1>();
  } else if (mistake != CopyMistake::no_wait) {
    wait_for_copies<0>();
  }
  if (mistake != CopyMistake::no_barrier) __syncthreads();
  for (int i = 0; i < 2; ++i) out[i * kThreads + t] = s[i][255 - 4 * t];
  wait_for_copies<0>();
}

void run_copies(CopyMistake mistake) {
  Buffer<float> in(8 * kThreads + 4), out(2 * kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
  launch(copies, dim3(1), dim3(kThreads), 0, nullptr, in.data(), out.data(), mistake);
  finish();
  for (int i = 0; i < 2 * kThreads; ++i) {
    expect(out[i] == float(i / 64 * 256 + 255 - 4 * (i % 64)), "copies", i);
  }
}

FAULT(copies_not_waited_for) {
  run_copies(broken ? CopyMistake::no_wait : CopyMistake::none);
}
FAULT(copies_waited_for_too_early) {
  run_copies(broken ? CopyMistake::waits_for_too_few : CopyMistake::none);
}
FAULT(copies_without_barrier) {
  run_copies(broken ? CopyMistake::no_barrier : CopyMistake::none);
}
FAULT(misaligned_copy) {
  run_copies(broken ? CopyMistake::misaligned : CopyMistake::none);
}

__global__ void leave_copy(const float* in) {
  __shared__ float s[kThreads];
  copy_async<4>(&s[threadIdx.x], in + threadIdx.x, 4);
}

__global__ void finish_copy(const float* in) {
  __shared__ float s[kThreads];
  copy_async<4>(&s[threadIdx.x], in + threadIdx.x, 4);
  commit_copies();
  wait_for_copies<0>();
}

FAULT(copies_outlive_thread) {
  Buffer<float> in(kThreads);
  launch(broken ? leave_copy : finish_copy, dim3(1), dim3(kThreads), 0, nullptr, in.data());
  finish();
}

__global__ void write_up_to(float* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = float(i);
}

FAULT(global_out_of_bounds) {
  Buffer<float> out(100);
  launch(write_up_to, dim3(2), dim3(kThreads), 0, nullptr, out.data(), broken ? 101 : 100);
  finish();
}

__global__ void shift_static(float* out, int by) {
  __shared__ float s[kThreads];
  s[threadIdx.x + by] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

FAULT(static_shared_out_of_bounds) {
  Buffer<float> out(kThreads);
  launch(shift_static, dim3(1), dim3(kThreads), 0, nullptr, out.data(), broken ? 1 : 0);
  finish();
}

__global__ void shift_dynamic(float* out, int by) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x + by] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

FAULT(dynamic_shared_out_of_bounds) {
  Buffer<float> out(kThreads);
  launch(shift_dynamic, dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, out.data(),
         broken ? 1 : 0);
  finish();
}

__global__ void load_vectors(const float* in, float4* out, int shift) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + shift);
}

FAULT(misaligned_vector) {
  Buffer<float> in(4 * 32 + 4);
  Buffer<float4> out(32);
  launch(load_vectors, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), broken ? 1 : 0);
  finish();
}

__global__ void divergent(int* out, bool broken) {
  if (broken && threadIdx.x >= 32) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

FAULT(divergent_barrier) {
  Buffer<int> out(kThreads);
  launch(divergent, dim3(1), dim3(kThreads), 0, nullptr, out.data(), broken);
  finish();
}

__global__ void lost(int* out, int reach) {
  out[threadIdx.x] = 1;
  if (int(threadIdx.x) < reach) __syncthreads();
}

FAULT(lost_barrier) {
  Buffer<int> out(kThreads);
  launch(lost, dim3(1), dim3(kThreads), 0, nullptr, out.data(), broken ? 40 : 64);
  finish();
}

// In every block a thread is missing, another one in each: the first of the schedule is reported,
// whichever OS thread is faster.
__global__ void many_lost(bool broken) {
  if (!broken || threadIdx.x != blockIdx.x) __syncthreads();
}

FAULT(lost_barriers) {
  launch(many_lost, dim3(20), dim3(kThreads), 0, nullptr, broken);
  finish();
}

__global__ void partial_shuffle(int* out, int lanes) {
  const int lane = threadIdx.x;
  if (lane < lanes) out[lane] = __shfl_xor_sync(~0u, lane, 1);
}

FAULT(shuffle_not_reached_by_its_mask) {
  Buffer<int> out(32);
  launch(partial_shuffle, dim3(1), dim3(32), 0, nullptr, out.data(), broken ? 16 : 32);
  finish();
}

__global__ void masked_shuffle(int* out, int by) {
  const int lane = threadIdx.x;
  if (lane < 16) out[lane] = __shfl_xor_sync(0xffffu, lane, by);
}

FAULT(shuffle_from_outside_of_its_mask) {
  Buffer<int> out(32);
  launch(masked_shuffle, dim3(1), dim3(32), 0, nullptr, out.data(), broken ? 16 : 8);
  finish();
}

__global__ void differing_shuffles(int* out, bool broken) {
  const int lane = threadIdx.x;
  if (broken && lane >= 16) {
    out[lane] = __shfl_xor_sync(~0u, lane, 1);
  } else {
    out[lane] = __shfl_xor_sync(~0u, lane, 2);
  }
}

FAULT(shuffles_at_two_places) {
  Buffer<int> out(32);
  launch(differing_shuffles, dim3(1), dim3(32), 0, nullptr, out.data(), broken);
  finish();
}

// The second block must not find what the first has left behind.
__global__ void unwritten(float* out, bool broken) {
  __shared__ float fixed[kThreads];
  float* s = dynamic_shared<float>();
  const int t = threadIdx.x;
  if (!broken || t || blockIdx.x == 0) fixed[t] = 1, s[t] = 2;
  __syncthreads();
  out[blockIdx.x * 128 + t] = fixed[63 - t];
  out[blockIdx.x * 128 + 64 + t] = s[63 - t];
}

FAULT(unwritten_shared) {
  Buffer<float> out(2 * 128);
  launch(unwritten, dim3(2), dim3(kThreads), kThreads * sizeof(float), nullptr, out.data(), broken);
  finish();
  for (int i = 0; i < 256; ++i) expect(out[i] == float(i / 64 % 2 + 1), "shared memory", i);
}

__global__ void load_rows(uint32_t* out, int shift) {
  __shared__ __align__(16) __half s[16 * 16 + 8];
  for (int i = threadIdx.x; i < 16 * 16 + 8; i += 32) s[i] = to_element<__half>(1);
  __syncwarp();
  uint32_t matrices[4];
  load_matrices(matrices, &s[threadIdx.x * 8 + shift]);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = matrices[i];
}

FAULT(misaligned_ldmatrix) {
  Buffer<uint32_t> out(128);
  launch(load_rows, dim3(1), dim3(32), 0, nullptr, out.data(), broken ? 4 : 8);
  finish();
}

__global__ void load_rows_of(const __half* in, uint32_t* out, bool global) {
  __shared__ __align__(16) __half s[16 * 16];
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = in[i];
  __syncwarp();
  uint32_t matrices[4];
  load_matrices(matrices, (global ? in : s) + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = matrices[i];
}

FAULT(ldmatrix_of_global_memory) {
  Buffer<__half> in(256);
  Buffer<uint32_t> out(128);
  launch(load_rows_of, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), broken);
  finish();
}

__global__ void add_to(float* out, bool same) {
  out[(same ? 0 : blockIdx.x * kThreads) + threadIdx.x] += 1;
}

FAULT(two_blocks_on_one_output) {
  Buffer<float> out(2 * kThreads);
  for (size_t i = 0; i < out.size(); ++i) out[i] = 0;
  launch(add_to, dim3(2), dim3(kThreads), 0, nullptr, out.data(), broken);
  finish();
}

__global__ void count(int* out, bool atomic) {
  if (atomic) {
    atomicAdd(out, 1);
  } else {
    *out += 1;
  }
}

FAULT(count_without_atomics) {
  Buffer<int> out(1);
  out[0] = 0;
  launch(count, dim3(2), dim3(kThreads), 0, nullptr, out.data(), !broken);
  finish();
  expect(out[0] == 128, "a count");
}

__global__ void nothing() {}

FAULT(too_much_shared_memory) {
  launch(nothing, dim3(1), dim3(1), broken ? (227 << 10) + 1 : 227 << 10, nullptr);
  finish();
}

FAULT(too_many_blocks_along_y) {
  launch(nothing, dim3(1, broken ? 65536 : 65535), dim3(1), 0, nullptr);
  finish();
}

// --------------------------------------------------------------------------------------------------
// sm_90

enum class HopperMistake {
  none,
  uninitialised,
  too_few_bytes,
  too_many_bytes,
  misaligned,
  no_wait,
  no_fence,
  no_products_wait,
  reuse_too_early,
};

// Copies a box of 8 x 64 halves twice to the same place and sums both up.
__global__ void two_boxes(const __grid_constant__ TensorMap map, float* out,
                          HopperMistake mistake) {
#ifdef CONVEXT_SM90A
  const __half* shared = dynamic_shared<__half>();
  __shared__ uint64_t full, empty;
  const int t = threadIdx.x, wrong = int(mistake);
  if (t == 0 && wrong != int(HopperMistake::uninitialised)) {
    init_mbarrier(&full, 1);
    init_mbarrier(&empty, 64);
    publish_mbarriers();
  }
  __syncthreads();
  float sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (t == 0) {
      if (turn && wrong != int(HopperMistake::reuse_too_early)) wait_for_phase(&empty, 0);
      const int more = wrong == int(HopperMistake::too_few_bytes)    ? -16
                       : wrong == int(HopperMistake::too_many_bytes) ? 16
                                                                     : 0;
      arrive_expecting(&full, uint32_t(8 * 64 * 2 + more));
      const int at[2] = {0, turn * 8};
      const int shift = wrong == int(HopperMistake::misaligned) ? 64 : 0;
      load_box(const_cast<__half*>(shared) + shift, map, &full, at);
    }
    if (wrong != int(HopperMistake::no_wait)) wait_for_phase(&full, turn);
    for (int row = 0; row < 8; ++row) {
      sum += to_float(shared[row * 64 + (t / 8 ^ row) * 8 + t % 8]);
    }
    arrive(&empty);
  }
  wait_for_phase(&full, 1);
  out[t] = sum;
#endif
}

void run_boxes(HopperMistake mistake) {
  Buffer<__half> in(64 * 16);
  Buffer<float> out(64);
  fill(in, 7);
  const MapTensor described{
      MapElement::float16, Swizzle::bytes128, in.data(), 2, {64, 16}, {0, 128}, {1, 1}};
  launch(two_boxes, dim3(1), dim3(64), 2048, nullptr, make_tensor_map(described, MapBox{{64, 8}}),
         out.data(), mistake);
  finish();
  for (int i = 0; i < 64; ++i) {
    float sum = 0;
    for (int row = 0; row < 16; ++row) sum += to_float(in[row * 64 + i]);
    expect(out[i] == sum, "sums of boxes", i);
  }
}

FAULT(mbarrier_uninitialised) {
  run_boxes(broken ? HopperMistake::uninitialised : HopperMistake::none);
}
FAULT(mbarrier_expects_too_few_bytes) {
  run_boxes(broken ? HopperMistake::too_few_bytes : HopperMistake::none);
}
FAULT(mbarrier_expects_too_many_bytes) {
  run_boxes(broken ? HopperMistake::too_many_bytes : HopperMistake::none);
}
FAULT(tma_misaligned) {
  run_boxes(broken ? HopperMistake::misaligned : HopperMistake::none);
}
FAULT(tma_not_waited_for) {
  run_boxes(broken ? HopperMistake::no_wait : HopperMistake::none);
}
FAULT(tma_into_what_is_read) {
  run_boxes(broken ? HopperMistake::reuse_too_early : HopperMistake::none);
}

// d (64 x 16) = ones (64 x 16) times ones (16 x 16), all operands in the same place.
__global__ void one_product(float* out, HopperMistake mistake) {
#ifdef CONVEXT_SM90A
  __half* shared = dynamic_shared<__half>();
  for (int i = threadIdx.x; i < 64 * 16; i += 128) shared[i] = to_element<__half>(1);
  fence_shared_for_async();
  __syncthreads();
  float d[8];
  const uint64_t both = matrix_in_shared(shared, Swizzle::bytes32, 256);
  if (mistake != HopperMistake::no_fence) fence_products();
  multiply<__half, 16>(d, both, both, false);
  commit_products();
  if (mistake != HopperMistake::no_products_wait) wait_for_products<0>();
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i * 128 + threadIdx.x] = d[i];
#endif
}

void run_product(HopperMistake mistake) {
  Buffer<float> out(8 * 128);
  launch(one_product, dim3(1), dim3(128), 2048, nullptr, out.data(), mistake);
  finish();
  for (size_t i = 0; i < out.size(); ++i) expect(out[i] == 16, "a product", i);
}

FAULT(wgmma_without_fence) {
  run_product(broken ? HopperMistake::no_fence : HopperMistake::none);
}
FAULT(wgmma_not_waited_for) {
  run_product(broken ? HopperMistake::no_products_wait : HopperMistake::none);
}

FAULT(tensor_map_with_odd_stride) {
  Buffer<__half> in(64 * 16);
  const MapTensor described{MapElement::float16,
                            Swizzle::bytes128,
                            in.data(),
                            2,
                            {60, 16},
                            {0, broken ? 120u : 128u},
                            {1, 1}};
  make_tensor_map(described, MapBox{{64, 8}});
}

}  // namespace
}  // namespace probes
