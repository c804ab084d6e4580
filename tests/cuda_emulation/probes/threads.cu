// Barriers, warps, atomics, copies: what every architecture has, and cp.async.
#include <cmath>

#include "probe.h"

namespace probes {
namespace {

__global__ void indices(int* found) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  found[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

PROBE(indices) {
  Buffer<int> found(24 * 70);
  launch(indices, dim3(2, 3, 4), dim3(7, 5, 2), 0, nullptr, found.data());
  finish();
  for (size_t i = 0; i < found.size(); ++i)
    expect(found[i] == int(i / 70 * 1000 + i % 70), "index", i);
}

__global__ void votes(int* counts) {
  const int t = threadIdx.x;
  const int multiples = __syncthreads_count(t % 3 == 0);
  const int any = __syncthreads_or(t == 77), none = __syncthreads_or(t == 100);
  const int all = __syncthreads_and(t < 100), not_all = __syncthreads_and(t != 50);
  counts[t] = multiples * 16 + (any != 0) * 8 + (none != 0) * 4 + (all != 0) * 2 + (not_all != 0);
}

PROBE(syncthreads_votes) {
  Buffer<int> counts(100);
  launch(votes, dim3(1), dim3(100), 0, nullptr, counts.data());
  finish();
  for (size_t i = 0; i < counts.size(); ++i) expect(counts[i] == 34 * 16 + 8 + 2, "votes", i);
}

// Every shuffle of one lane's number, in parts of `width`.
__global__ void shuffles(int* got, int width, int by) {
  const int lane = threadIdx.x;
  got[lane] = __shfl_sync(~0u, lane, by, width);
  got[32 + lane] = __shfl_up_sync(~0u, lane, by, width);
  got[64 + lane] = __shfl_down_sync(~0u, lane, by, width);
  got[96 + lane] = __shfl_xor_sync(~0u, lane, by, width);
}

PROBE(shuffles) {
  for (int width : {32, 16, 8, 4, 2}) {
    for (int by : {0, 1, 2, 5, 13}) {
      Buffer<int> got(128);
      launch(shuffles, dim3(1), dim3(32), 0, nullptr, got.data(), width, by);
      finish();
      for (int lane = 0; lane < 32; ++lane) {
        const int first = lane / width * width;
        expect(got[lane] == first + by % width, "shfl", lane);
        expect(got[32 + lane] == (lane - by >= first ? lane - by : lane), "shfl_up", lane);
        expect(got[64 + lane] == (lane + by < first + width ? lane + by : lane), "shfl_down", lane);
        // PTX ISA, shfl.bfly: in range up to the end of the part, so that a jump backwards is
        // taken.
        const int other = lane ^ by;
        expect(got[96 + lane] == (other < first + width ? other : lane), "shfl_xor", lane);
      }
    }
  }
}

__global__ void parts(unsigned* got) {
  const int lane = threadIdx.x;
  // Two parts of a warp on ways of their own.
  if (lane < 12) {
    double sum = lane;
    for (int by = 1; by < 4; by *= 2) sum += __shfl_xor_sync(0xfffu, sum, by);
    got[lane] = unsigned(sum);
  } else {
    got[lane] = __ballot_sync(0xfffff000u, lane % 2);
  }
  __syncwarp();
  got[32 + lane] = __any_sync(~0u, lane == 31) * 2 + __all_sync(~0u, lane < 31);
  got[64 + lane] = __match_any_sync(~0u, lane / 5);
}

PROBE(warp_votes) {
  Buffer<unsigned> got(96);
  launch(parts, dim3(1), dim3(32), 0, nullptr, got.data());
  finish();
  for (int lane = 0; lane < 32; ++lane) {
    const unsigned four = unsigned(lane / 4 * 16 + 6);
    expect(got[lane] == (lane < 12 ? four : 0xaaaaa000u), "parts", lane);
    expect(got[32 + lane] == 2, "any, all", lane);
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) same |= unsigned(other / 5 == lane / 5) << other;
    expect(got[64 + lane] == same, "match_any", lane);
  }
}

__global__ void atomics(int* sum, unsigned* most, int* least, unsigned long long* many,
                        int* slots) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  slots[atomicAdd(sum, 1)] = 1;  // every old value once
  atomicMax(most, unsigned(i * 37 % 1000));
  atomicMin(least, i * 37 % 1000 - 500);
  atomicAdd(many, 1ull << 33);
  int old = atomicAdd(&slots[1000], 0), seen;  // a maximum by compare and swap
  do {
    seen = old;
    old = atomicCAS(&slots[1000], seen, max(seen, i));
  } while (old != seen);
  atomicExch(&slots[1001], 5);
}

PROBE(atomics) {
  Buffer<int> sum(1), least(1), slots(1002);
  Buffer<unsigned> most(1);
  Buffer<unsigned long long> many(1);
  sum[0] = 0, least[0] = 0, most[0] = 0, many[0] = 0, slots[1000] = 0;
  launch(atomics, dim3(10), dim3(100), 0, nullptr, sum.data(), most.data(), least.data(),
         many.data(), slots.data());
  finish();
  expect(sum[0] == 1000 && most[0] == 999 && least[0] == -500, "atomicAdd, Max, Min");
  expect(many[0] == 1000ull << 33, "64 bits");
  for (int i = 0; i < 1000; ++i) expect(slots[i] == 1, "old values", i);
  expect(slots[1000] == 999 && slots[1001] == 5, "atomicCAS, atomicExch");
}

__global__ void vectors(const float4* in, float4* out, const __half2* halves, __half2* halves_out) {
  const int t = threadIdx.x;
  const float4 v = __ldg(&in[t]);
  out[t] = make_float4(rsqrtf(v.x), fmaf(v.y, v.z, v.w), fminf(v.x, v.y), float(max(2, t)));
  halves_out[t] = halves[31 - t];
}

PROBE(vectors) {
  Buffer<float4> in(32), out(32);
  Buffer<__half2> halves(32), halves_out(32);
  for (int i = 0; i < 32; ++i) {
    in[i] = make_float4(float((i + 1) * (i + 1)), float(i), 3, 5);
    halves[i] = __half2(__float2half_rn(float(i)), __float2half_rn(-float(i)));
  }
  launch(vectors, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), halves.data(),
         halves_out.data());
  finish();
  for (int i = 0; i < 32; ++i) {
    expect(std::abs(out[i].x * float(i + 1) - 1) < 1e-6, "rsqrtf", i);
    expect(out[i].y == float(i * 3 + 5), "fmaf", i);
    expect(out[i].z == float(i) && out[i].w == float(std::max(2, i)), "fminf, max", i);
    expect(__half2float(halves_out[i].x) == float(31 - i), "half2", i);
  }
}

// Copies rows of 8 pieces through three stages of shared memory.
template <int kBytes>
__global__ void staged_copy(const unsigned char* in, unsigned char* out, int steps, int valid) {
  constexpr int kStages = 3;
  __shared__ __align__(16) unsigned char stage[kStages][8 * kBytes];
  const int t = threadIdx.x;
  for (int step = 0; step < steps + kStages - 1; ++step) {
    if (step < steps) {
      copy_async<kBytes>(&stage[step % kStages][t * kBytes], in + (step * 8 + t) * kBytes, valid);
    }
    commit_copies();  // where there is none, an empty group keeps the count
    if (step < kStages - 1) continue;
    wait_for_copies<kStages - 1>();
    __syncthreads();
    const int done = step - (kStages - 1), other = 7 - t;
    for (int i = 0; i < kBytes; ++i) {
      out[(done * 8 + t) * kBytes + i] = stage[done % kStages][other * kBytes + i];
    }
    __syncthreads();
  }
}

template <int kBytes>
void check_copies() {
  for (int valid : {kBytes, kBytes - 1, 0}) {
    Buffer<unsigned char> in(40 * kBytes), out(40 * kBytes);
    for (size_t i = 0; i < in.size(); ++i) in[i] = (unsigned char)(i * 7 + 1);
    launch(staged_copy<kBytes>, dim3(1), dim3(8), 0, nullptr, in.data(), out.data(), 5, valid);
    finish();
    for (int i = 0; i < int(in.size()); ++i) {
      const int piece = i / kBytes, from = piece / 8 * 8 + 7 - piece % 8;
      const int byte = i % kBytes;
      expect(out[i] == (byte < valid ? in[from * kBytes + byte] : 0), "cp.async", i);
    }
  }
}

PROBE(copy_async) {
  check_copies<4>();
  check_copies<8>();
  check_copies<16>();
}

}  // namespace
}  // namespace probes
