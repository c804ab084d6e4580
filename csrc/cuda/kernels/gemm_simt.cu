// The product in ordinary arithmetic: float32 and float64 exact, 16-bit factors summed in float32.
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/gemm_moments.h"
#include "cuda/kernels/gemm_output.h"

namespace convext::cuda {
namespace {

// A thread's products: 4 x 4 pieces of a tile, kM / 4 by kN / 4 of them, spread over the tile so
// that the threads of a warp read neighbouring banks.
template <int kTileM, int kTileN, int kTileK, int kM, int kN, int kChain>
struct SimtTile {
  static constexpr int m = kTileM, n = kTileN, k = kTileK, thread_m = kM, thread_n = kN;
  static constexpr int chain = kChain;
  static constexpr int columns = kTileN / kN;  // threads along n
  static constexpr int threads = kTileM / kM * columns;
  static_assert(kM % 4 == 0 && kN % 4 == 0);

  __device__ static int row(int thread, int i) {
    return thread / columns * 4 + i / 4 * (kTileM / (kM / 4)) + i % 4;
  }
  __device__ static int column(int thread, int j) {
    return thread % columns * 4 + j / 4 * (kTileN / (kN / 4)) + j % 4;
  }
};

// The last is how many products are summed in a chain, before chains are: the error of a sum grows
// with the lengths of both. To end a chain takes a thread 3 instructions a sum, a tenth of the work
// between ends of chains of 32; large tiles are for products that keep the multipliers busy, and
// there it is a fortieth.
using LargeTile = SimtTile<128, 64, 8, 8, 8, 128>;
using SmallTile = SimtTile<64, 32, 16, 4, 4, 32>;

template <class T, class Tile>
struct SimtShared {
  // [k][row], rows of 4 more so that threads that write one row's k's meet different banks.
  Sum<T> a[2][Tile::k][Tile::m + 4], b[2][Tile::k][Tile::n + 4];
  Place a_rows[Tile::m], b_rows[Tile::n], a_k[2][Tile::k], b_k[2][Tile::k];
  Sum<T> chains[Tile::thread_m * Tile::thread_n][Tile::threads];
};

// Brings tiles of an operand into shared memory through registers, kWide elements at a time.
template <class T, int kRows, int kDepth, int kThreads, bool kAlongK, int kWide>
class SimtLoader {
  static constexpr int kLine = (kAlongK ? kDepth : kRows) / kWide;  // vectors of a line
  static constexpr int kLines = kThreads / kLine;                   // lines at a time
  static constexpr int kCount = kRows * kDepth / kWide / kThreads;
  static_assert(kThreads % kLine == 0 && kCount * kWide * kThreads == kRows * kDepth);

 public:
  __device__ SimtLoader(const GemmOperand& operand, uint32_t group)
      : operand_(operand),
        from_(static_cast<const T*>(operand.from) + group * operand.group),
        along_(threadIdx.x % kLine * kWide),
        across_(threadIdx.x / kLine) {}

  __device__ void load(const Place* rows, const Place* ks) {
    const Place own = kAlongK ? ks[along_] : rows[along_];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place other = kAlongK ? rows[across_ + i * kLines] : ks[across_ + i * kLines];
      if (operand_.holds(own, other)) {
        staged_[i] = *reinterpret_cast<const Vector<T, kWide>*>(from_ + own.offset + other.offset);
      } else {
#pragma unroll
        for (int e = 0; e < kWide; ++e) staged_[i].of[e] = narrow<T>(0);
      }
    }
  }

  __device__ void store(Sum<T> (*tile)[kRows + 4]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int across = across_ + i * kLines;
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        (kAlongK ? tile[along_ + e][across] : tile[across][along_ + e]) = widen(staged_[i].of[e]);
      }
    }
  }

 private:
  const GemmOperand& operand_;
  const T* from_;
  int along_, across_;
  Vector<T, kWide> staged_[kCount];
};

template <class S, int kCount>
__device__ __forceinline__ void load_fours(S (&to)[kCount], const S* from, int distance) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Vector<S, 4> four = *reinterpret_cast<const Vector<S, 4>*>(from + i / 4 * distance);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[i + e] = four.of[e];
  }
}

template <class T, class Tile, bool kAAlongK, bool kBAlongK, int kWide>
__global__ void __launch_bounds__(Tile::threads)
    simt_kernel(const Gemm g, const Epilogue<T> epilogue) {
  using S = Sum<T>;
  using Shared = SimtShared<T, Tile>;
  Shared& shared = *dynamic_shared<Shared>();
  const int thread = threadIdx.x;
  const GemmBlock block = GemmBlock::of(g, blockIdx.x);
  const uint32_t m0 = block.m_tile * Tile::m, n0 = block.n_tile * Tile::n;
  const uint32_t first_k = block.split * g.split_k;
  const uint32_t end_k = first_k + g.split_k < g.k ? first_k + g.split_k : g.k;
  const int steps = first_k < end_k ? int((end_k - first_k + Tile::k - 1) / Tile::k) : 0;

  for (int i = thread; i < Tile::m; i += Tile::threads) shared.a_rows[i] = g.a.rows.at(m0 + i);
  for (int i = thread; i < Tile::n; i += Tile::threads) shared.b_rows[i] = g.b.rows.at(n0 + i);
  const auto locate = [&](int step) {
    if (thread < 2 * Tile::k) {
      const uint32_t k = first_k + step * Tile::k + thread % Tile::k;
      const Axis& axis = thread < Tile::k ? g.a.k : g.b.k;
      Place(&places)[2][Tile::k] = thread < Tile::k ? shared.a_k : shared.b_k;
      places[step % 2][thread % Tile::k] = k < end_k ? axis.at(k) : Place{0, kNowhere, 0};
    }
  };
  locate(0);
  locate(1);
  __syncthreads();

  SimtLoader<T, Tile::m, Tile::k, Tile::threads, kAAlongK, kWide> a_loader(g.a, block.group);
  SimtLoader<T, Tile::n, Tile::k, Tile::threads, kBAlongK, kWide> b_loader(g.b, block.group);
  S sums[Tile::thread_m][Tile::thread_n] = {};
  bool chained = false;
  const auto end_chain = [&] {
#pragma unroll
    for (int i = 0; i < Tile::thread_m; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::thread_n; ++j) {
        S& chain = shared.chains[i * Tile::thread_n + j][thread];
        chain = chained ? chain + sums[i][j] : sums[i][j];
        sums[i][j] = 0;
      }
    }
    chained = true;
  };

  if (steps > 0) {
    a_loader.load(shared.a_rows, shared.a_k[0]);
    b_loader.load(shared.b_rows, shared.b_k[0]);
    a_loader.store(shared.a[0]);
    b_loader.store(shared.b[0]);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const int now = step % 2;
    if (step + 1 < steps) {
      a_loader.load(shared.a_rows, shared.a_k[1 - now]);
      b_loader.load(shared.b_rows, shared.b_k[1 - now]);
    }
#pragma unroll
    for (int k = 0; k < Tile::k; ++k) {
      S a[Tile::thread_m], b[Tile::thread_n];
      load_fours(a, &shared.a[now][k][Tile::row(thread, 0)], Tile::row(0, 4 % Tile::thread_m));
      load_fours(b, &shared.b[now][k][Tile::column(thread, 0)],
                 Tile::column(0, 4 % Tile::thread_n));
#pragma unroll
      for (int i = 0; i < Tile::thread_m; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::thread_n; ++j) {
          sums[i][j] = multiply_add(a[i], b[j], sums[i][j]);
        }
      }
    }
    if (step + 1 < steps) {
      a_loader.store(shared.a[1 - now]);
      b_loader.store(shared.b[1 - now]);
      // Read last before the barrier before this step.
      locate(step + 2);
      if ((step + 1) % (Tile::chain / Tile::k) == 0) end_chain();
    }
    __syncthreads();
  }
  end_chain();

  // From shared memory, for loops over registers would be code for each of them.
  const GemmWriter<T> writer(g, epilogue, block.group, block.split);
  const auto chain = [&](int i, int j) -> S& {
    return shared.chains[i * Tile::thread_n + j][thread];
  };
  if (g.moments) {
    const MomentsOfTile<S> moments(g, block, Tile::m, Tile::n);
#pragma unroll 1
    for (int j = 0; j < Tile::thread_n; ++j) {
      const uint32_t column = Tile::column(thread, j);
      if (column >= moments.columns) continue;
      const ChannelEpilogue<T> finish(epilogue, int64_t(block.group) * g.n + n0 + column);
      for (int i = 0; i < Tile::thread_m; ++i) chain(i, j) = widen(narrow<T>(finish(chain(i, j))));
    }
    constexpr int kSlots = Tile::threads / Tile::columns;
    static_assert(sizeof shared.a >= sizeof(S) * (kSlots + 1) * Tile::n);
    sum_moments<Tile::n, kSlots>(
        reinterpret_cast<S(*)[Tile::n]>(shared.a), moments.rows, moments.columns, moments.mean,
        moments.deviation, [&](const auto& each) {
#pragma unroll 1
          for (int j = 0; j < Tile::thread_n; ++j) {
            each(Tile::column(thread, j), thread / Tile::columns, [&](const auto& of) {
              S total = 0;
              for (int i = 0; i < Tile::thread_m; ++i) {
                if (uint32_t(Tile::row(thread, i)) < moments.rows) total += of(chain(i, j));
              }
              return total;
            });
          }
        });
  }
  if (writer.along_rows()) {
#pragma unroll 1
    for (int i = 0; i < Tile::thread_m; i += 4) {
#pragma unroll 1
      for (int j = 0; j < Tile::thread_n; ++j) {
        const S four[4] = {chain(i, j), chain(i + 1, j), chain(i + 2, j), chain(i + 3, j)};
        writer.store_rows(m0 + Tile::row(thread, i), n0 + Tile::column(thread, j), four);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Tile::thread_m; ++i) {
#pragma unroll 1
      for (int j = 0; j < Tile::thread_n; j += 4) {
        const S four[4] = {chain(i, j), chain(i, j + 1), chain(i, j + 2), chain(i, j + 3)};
        writer.store_columns(m0 + Tile::row(thread, i), n0 + Tile::column(thread, j), four);
      }
    }
  }
}

template <class T, class Tile, bool kAAlongK, bool kBAlongK, int kWide>
void launch_simt(const Gemm& g, const Conv2dCall& call) {
  launch(simt_kernel<T, Tile, kAAlongK, kBAlongK, kWide>, gemm_grid(g), dim3(Tile::threads),
         sizeof(SimtShared<T, Tile>), call.stream, g, Epilogue<T>(call));
}

// Any direction is right for any operand: where an instance is not made, that of another is taken.
template <class T, class Tile>
void launch_simt(const Gemm& g, const Conv2dCall& call) {
  if constexpr (std::is_same_v<T, float>) {
    if (g.a.vectors && g.a.aligned && g.b.vectors && g.b.aligned) {
      if (g.a.along_k && g.b.along_k) return launch_simt<T, Tile, true, true, 4>(g, call);
      if (g.a.along_k) return launch_simt<T, Tile, true, false, 4>(g, call);
      if (!g.b.along_k) return launch_simt<T, Tile, false, false, 4>(g, call);
    }
  }
  if (g.a.along_k) return launch_simt<T, Tile, true, true, 1>(g, call);
  if (g.b.along_k) return launch_simt<T, Tile, false, true, 1>(g, call);
  return launch_simt<T, Tile, false, false, 1>(g, call);
}

}  // namespace

template <class T>
void multiply_simt(const Gemm& g, const Conv2dCall& call) {
  if constexpr (std::is_same_v<T, float>) {
    if (g.large_tiles) return launch_simt<T, LargeTile>(g, call);
  }
  launch_simt<T, SmallTile>(g, call);
}

template void multiply_simt<float>(const Gemm&, const Conv2dCall&);
template void multiply_simt<double>(const Gemm&, const Conv2dCall&);
template void multiply_simt<__half>(const Gemm&, const Conv2dCall&);
template void multiply_simt<__nv_bfloat16>(const Gemm&, const Conv2dCall&);

}  // namespace convext::cuda
