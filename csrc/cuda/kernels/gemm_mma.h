// The product on tensor cores: tiles of both operands come to shared memory by asynchronous copies,
// several steps ahead, and go from there to the multipliers of a warp. float16, bfloat16, and
// float32 rounded to TF32; sums in float32.
#pragma once

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/gemm_moments.h"
#include "cuda/kernels/gemm_output.h"

namespace convext::cuda {

// For sm_100 the compiler wants more registers than 128 for the same loop.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRegisters = 256;
#else
constexpr int kRegisters = 128;
#endif

// A block's tile and a warp's part of it. A step is 64 bytes deep: 32 elements of 16 bits, 16
// of 32.
template <class T, int kTileM, int kTileN, int kWarpM, int kWarpN, int kAhead>
struct MmaTile {
  static constexpr int m = kTileM, n = kTileN, warp_m = kWarpM, warp_n = kWarpN, stages = kAhead;
  static constexpr int warps_n = kTileN / kWarpN, warps = kTileM / kWarpM * warps_n;
  static constexpr int threads = warps * 32;
  // Of a multiprocessor, for its 65536 registers: 128 a thread, or for the many addresses and
  // roundings of 32-bit elements in large tiles twice as many.
  static constexpr int blocks =
      65536 / (sizeof(T) == 4 && kTileM == 128 ? 256 : kRegisters) / threads;
  static constexpr int k = 64 / sizeof(T);
  static constexpr int bytes_a = kTileM * 64, bytes_b = kTileN * 64;
  static constexpr int stage_bytes = bytes_a + bytes_b;
  // At the end, a part of the sums of a warp: 16 rows, or 8 columns.
  static constexpr int row_pitch = kWarpN + 8, column_pitch = kWarpM + 4;
  static constexpr int slab = 16 * row_pitch > 8 * column_pitch ? 16 * row_pitch : 8 * column_pitch;
  static constexpr int shared_bytes =
      stages * stage_bytes > warps * slab * 4 ? stages * stage_bytes : warps * slab * 4;
};

// A tile of an operand in shared memory, in chunks of 16 bytes. Along k it is [row][4 chunks of k],
// otherwise [k][chunks of rows]. Chunks of a line are permuted so that the eight lines that
// load_matrices reads at a time, or the 32 elements of 32 bits that a warp does, lie in different
// banks.
template <class T, int kRows, bool kAlongK>
struct MmaOperandTile {
  static constexpr int line = kAlongK ? 4 : kRows * int(sizeof(T)) / 16;

  __device__ static int chunk(int at, int along) {
    const int turn = kAlongK ? at >> 1 & 3 : sizeof(T) == 2 ? at & 7 : (at & 3) * 2;
    return at * line + (along ^ turn);
  }

  // A fragment: 16 rows, two chunks deep, in the order of the A operand of mma; as B, matrices 0
  // and 2 are the first eight rows', 1 and 3 the others'.
  __device__ static void load(uint32_t (&to)[4], const char* tile, int row, int depth) {
    const int lane = threadIdx.x % 32;
    if constexpr (kAlongK) {
      load_matrices(to, tile + chunk(row + lane % 16, depth * 2 + lane / 16) * 16);
    } else if constexpr (sizeof(T) == 2) {
      load_matrices<true>(
          to, tile + chunk(depth * 16 + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2) * 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + lane / 4 + i % 2 * 8, k = depth * 8 + lane % 4 + i / 2 * 4;
        to[i] = *reinterpret_cast<const uint32_t*>(tile + chunk(k, r / 4) * 16 + r % 4 * 4);
      }
    }
  }
};

// Starts copies of an operand's tiles.
template <class T, int kRows, int kThreads, bool kAlongK>
class MmaLoader {
  using Tile = MmaOperandTile<T, kRows, kAlongK>;
  static constexpr int kLines = kThreads / Tile::line;  // at a time
  static constexpr int kCount = kRows * 4 / kThreads;
  static_assert(kThreads % Tile::line == 0 && kCount * kThreads == kRows * 4 && kLines % 8 == 0);

 public:
  __device__ MmaLoader(const GemmOperand& operand, uint32_t group, uint32_t first_row)
      : operand_(operand),
        from_(static_cast<const T*>(operand.from) + group * operand.group),
        along_(threadIdx.x % Tile::line),
        across_(threadIdx.x / Tile::line) {
#pragma unroll
    for (int i = 0; i < (kAlongK ? kCount : 1); ++i) {
      rows_[i] =
          operand.rows.at(first_row + (kAlongK ? across_ + i * kLines : along_ * kVector<T>));
    }
  }

  __device__ void copy(char* tile, uint32_t first_k, uint32_t end_k) const {
    Place at_k{};
    if (kAlongK) at_k = locate(first_k + along_ * kVector<T>, end_k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kAlongK) at_k = locate(first_k + across_ + i * kLines, end_k);
      const Place& row = rows_[kAlongK ? i : 0];
      const bool held = operand_.holds(row, at_k);
      char* const to = tile + Tile::chunk(across_ + i * kLines, along_) * 16;
      const T* const from = held ? from_ + row.offset + at_k.offset : from_;
      if (operand_.aligned) {
        copy_async<16>(to, from, held ? 16 : 0);
        continue;
      }
      Vector<T, kVector<T>> vector;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) vector.of[e] = held ? from[e] : narrow<T>(0);
      *reinterpret_cast<Vector<T, kVector<T>>*>(to) = vector;
    }
  }

 private:
  __device__ Place locate(uint32_t k, uint32_t end) const {
    return k < end ? operand_.k.at(k) : Place{0, kNowhere, 0};
  }

  const GemmOperand& operand_;
  const T* from_;
  int along_, across_;
  Place rows_[kAlongK ? kCount : 1];
};

template <class T>
__device__ __forceinline__ void multiply_fragments(float (&sums)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(sums, a, b);
  } else {
    mma_m16n8k16<T>(sums, a, b);
  }
}

template <class T>
__device__ __forceinline__ void round_fragment(uint32_t (&fragment)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& bits : fragment) bits = to_tf32(std::bit_cast<float>(bits));
  }
}

// A warp's sums go through shared memory, so that lanes next to each other store elements that are.
template <class T, class Tile>
__device__ void store_sums(const GemmWriter<T>& writer, float* slab, uint32_t m0, uint32_t n0,
                           const float (&sums)[Tile::warp_m / 16][Tile::warp_n / 8][4]) {
  constexpr int kWide = kVector<T>;
  const int lane = threadIdx.x % 32;
  // Loops over pieces stay loops, for what stores is much code; only registers want constant
  // indices.
  if (writer.along_rows()) {
#pragma unroll 1
    for (int piece = 0; piece < Tile::warp_n / 8; ++piece) {  // 8 columns
#pragma unroll
      for (int j = 0; j < Tile::warp_n / 8; ++j) {
        if (j != piece) continue;
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            slab[(lane % 4 * 2 + e % 2) * Tile::column_pitch + i * 16 + lane / 4 + e / 2 * 8] =
                sums[i][j][e];
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int at = lane; at < 8 * Tile::warp_m; at += 32) {
        const int column = at / Tile::warp_m, row = at % Tile::warp_m;
        writer.store(m0 + row, n0 + piece * 8 + column, slab[column * Tile::column_pitch + row]);
      }
      __syncwarp();
    }
    return;
  }
  constexpr int kLine = Tile::warp_n / kWide;
#pragma unroll 1
  for (int piece = 0; piece < Tile::warp_m / 16; ++piece) {  // 16 rows
#pragma unroll
    for (int i = 0; i < Tile::warp_m / 16; ++i) {
      if (i != piece) continue;
#pragma unroll
      for (int j = 0; j < Tile::warp_n / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          *reinterpret_cast<Vector<float, 2>*>(
              &slab[(lane / 4 + e / 2 * 8) * Tile::row_pitch + j * 8 + lane % 4 * 2]) = {
              sums[i][j][e], sums[i][j][e + 1]};
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int at = lane; at < 16 * kLine; at += 32) {
      const int row = at / kLine, column = at % kLine * kWide;
      float neighbours[kWide];
#pragma unroll
      for (int e = 0; e < kWide; e += 4) {
        const auto four =
            *reinterpret_cast<Vector<float, 4>*>(&slab[row * Tile::row_pitch + column + e]);
#pragma unroll
        for (int f = 0; f < 4; ++f) neighbours[e + f] = four.of[f];
      }
      writer.store_columns(m0 + piece * 16 + row, n0 + column, neighbours);
    }
    __syncwarp();
  }
}

// Takes the sums through the epilogue, and moments of what comes out.
template <class T, class Tile>
__device__ void finish_with_moments(const Gemm& g, const Epilogue<T>& epilogue,
                                    const GemmBlock& block, float* shared,
                                    float (&sums)[Tile::warp_m / 16][Tile::warp_n / 8][4]) {
  constexpr int kSlots = Tile::m / Tile::warp_m * 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / Tile::warps_n * Tile::warp_m + lane / 4;
  const int first_column = warp % Tile::warps_n * Tile::warp_n + lane % 4 * 2;
  const int slot = warp / Tile::warps_n * 8 + lane / 4;
  const MomentsOfTile<float> moments(g, block, Tile::m, Tile::n);
#pragma unroll
  for (int j = 0; j < Tile::warp_n / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t column = first_column + j * 8 + e;
      if (column >= moments.columns) continue;
      const ChannelEpilogue<T> finish(epilogue,
                                      int64_t(block.group) * g.n + block.n_tile * Tile::n + column);
#pragma unroll
      for (int i = 0; i < Tile::warp_m / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& sum = sums[i][j][half * 2 + e];
          sum = widen(narrow<T>(finish(sum)));
        }
      }
    }
  }
  sum_moments<Tile::n, kSlots>(
      reinterpret_cast<float (*)[Tile::n]>(shared), moments.rows, moments.columns, moments.mean,
      moments.deviation, [&](const auto& each) {
#pragma unroll
        for (int j = 0; j < Tile::warp_n / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            each(first_column + j * 8 + e, slot, [&](const auto& of) {
              float total = 0;
#pragma unroll
              for (int i = 0; i < Tile::warp_m / 16; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const float value = of(sums[i][j][half * 2 + e]);
                  if (uint32_t(first_row + i * 16 + half * 8) < moments.rows) total += value;
                }
              }
              return total;
            });
          }
        }
      });
}

// Moments ask for registers that large tiles have only if there is one block to a multiprocessor.
template <class T, class Tile, bool kAAlongK, bool kBAlongK, bool kMoments>
__global__ void __launch_bounds__(Tile::threads, kMoments&& Tile::m == 128 ? 1 : Tile::blocks)
    mma_kernel(const Gemm g, const Epilogue<T> epilogue) {
  using TileA = MmaOperandTile<T, Tile::m, kAAlongK>;
  using TileB = MmaOperandTile<T, Tile::n, kBAlongK>;
  constexpr int kFragmentsM = Tile::warp_m / 16, kFragmentsN = Tile::warp_n / 8;
  char* const shared = dynamic_shared<char>();
  const GemmBlock block = GemmBlock::of(g, blockIdx.x);
  const uint32_t m0 = block.m_tile * Tile::m, n0 = block.n_tile * Tile::n;
  const uint32_t first_k = block.split * g.split_k;
  const uint32_t end_k = first_k + g.split_k < g.k ? first_k + g.split_k : g.k;
  const int steps = first_k < end_k ? int((end_k - first_k + Tile::k - 1) / Tile::k) : 0;
  const int warp = threadIdx.x / 32;
  const int warp_m = warp / Tile::warps_n * Tile::warp_m;
  const int warp_n = warp % Tile::warps_n * Tile::warp_n;

  const MmaLoader<T, Tile::m, Tile::threads, kAAlongK> a_loader(g.a, block.group, m0);
  const MmaLoader<T, Tile::n, Tile::threads, kBAlongK> b_loader(g.b, block.group, n0);
  const auto copy = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % Tile::stages * Tile::stage_bytes;
      a_loader.copy(stage, first_k + step * Tile::k, end_k);
      b_loader.copy(stage + Tile::bytes_a, first_k + step * Tile::k, end_k);
    }
    commit_copies();  // be it empty: the wait counts groups
  };

  float sums[kFragmentsM][kFragmentsN][4] = {};
#pragma unroll
  for (int step = 0; step < Tile::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Tile::stages - 2>();
    // Now this step's tiles are everyone's, and the last step's are nobody's.
    __syncthreads();
    copy(step + Tile::stages - 1);
    const char* const a_tile = shared + step % Tile::stages * Tile::stage_bytes;
    const char* const b_tile = a_tile + Tile::bytes_a;
#pragma unroll
    for (int depth = 0; depth < 2; ++depth) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        TileA::load(a[i], a_tile, warp_m + i * 16, depth);
        round_fragment<T>(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j) {
        TileB::load(b[j], b_tile, warp_n + j * 16, depth);
        round_fragment<T>(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          const uint32_t columns[2] = {b[j / 2][j % 2], b[j / 2][j % 2 + 2]};
          multiply_fragments<T>(sums[i][j], a[i], columns);
        }
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  if constexpr (kMoments) {
    finish_with_moments<T, Tile>(g, epilogue, block, reinterpret_cast<float*>(shared), sums);
  }
  const GemmWriter<T> writer(g, epilogue, block.group, block.split);
  store_sums<T, Tile>(writer, reinterpret_cast<float*>(shared) + warp * Tile::slab, m0 + warp_m,
                      n0 + warp_n, sums);
}

template <class T, class Tile, bool kAAlongK, bool kBAlongK, bool kMoments = false>
void launch_mma(const Gemm& g, const Conv2dCall& call) {
  launch(mma_kernel<T, Tile, kAAlongK, kBAlongK, kMoments>, gemm_grid(g), dim3(Tile::threads),
         Tile::shared_bytes, call.stream, g, Epilogue<T>(call));
}

// Moments are of a forward pass, whose channels lie along k on both sides.
template <class T, class Tile>
void launch_mma(const Gemm& g, const Conv2dCall& call) {
  if (g.moments) {
    launch_mma<T, Tile, true, true, true>(g, call);
  } else if (g.a.along_k && g.b.along_k) {
    launch_mma<T, Tile, true, true>(g, call);
  } else if (g.a.along_k) {
    launch_mma<T, Tile, true, false>(g, call);
  } else {
    launch_mma<T, Tile, false, false>(g, call);
  }
}

template <class T>
void multiply_mma(const Gemm& g, const Conv2dCall& call) {
  if (g.large_tiles) {
    launch_mma<T, MmaTile<T, 128, 128, 64, 32, 4>>(g, call);
  } else {
    launch_mma<T, MmaTile<T, 64, 64, 32, 32, 4>>(g, call);
  }
}

}  // namespace convext::cuda
