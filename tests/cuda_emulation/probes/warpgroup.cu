// wgmma, fed by TMA through a ring of stages with mbarriers: whole products of matrices.
#include "cuda/kernels/hopper.h"
#include "probe.h"

namespace probes {
namespace {

constexpr int kStages = 3, kRows = 64, kThreads = 160;  // 128 multiply, one of the others copies

// What shared memory a tile takes, `rows` by one step along k.
constexpr int tile_bytes(int rows, int depth, int element) {
  return (rows * depth * element + 1023) / 1024 * 1024;
}

// c (m x n) = a b. Not transposed, a is (m, k) and b is (n, k); transposed, a is (k, m), b (k, n).
// The step along k is a row of the swizzle, 16 elements where there is none; for transposed
// operands 64.
template <class T, class Element, int kColumns, bool kTransposedA, bool kTransposedB,
          Swizzle kSwizzle>
struct Gemm {
  static constexpr int kElement = sizeof(Element);
  static constexpr int kPiece = 16 / kElement;
  static constexpr bool kPlain = kSwizzle == Swizzle::none;
  static constexpr int kRow = int(row_bytes(kSwizzle)) / kElement;  // elements
  static constexpr int kDepth = kTransposedA || kTransposedB ? 64 : kPlain ? 2 * kPiece : kRow;
  static constexpr int kBytesA = tile_bytes(kRows, kDepth, kElement);
  static constexpr int kBytesB = tile_bytes(kColumns, kDepth, kElement);
  static constexpr int kShared = kStages * (kBytesA + kBytesB);

  // A tile is boxes of one row of the swizzle, one after the other: along k, or across where
  // transposed.
  static __device__ void load(unsigned char* to, const TensorMap& map, uint64_t* barrier,
                              bool transposed, int across, int length, int k) {
    const int boxes = (transposed ? length : kDepth) / kRow;
    for (int i = 0; i < boxes; ++i) {
      const int at[2] = {transposed ? across + i * kRow : k + i * kRow, transposed ? k : across};
      load_box(to + size_t(i) * kRow * kElement * (transposed ? kDepth : length), map, barrier, at);
    }
  }

  // The operand of the product at `k` within the tile.
  static __device__ uint64_t operand(const unsigned char* tile, bool transposed, int length,
                                     int k) {
    constexpr uint32_t kRowBytes = kRow * kElement;
    if (transposed) {
      const uint32_t eight_along_k = 8 * kRowBytes, next_across = kDepth * kRowBytes;
      return matrix_in_shared(tile + k * kRowBytes, kSwizzle, kPlain ? next_across : eight_along_k,
                              kPlain ? eight_along_k : next_across);
    }
    const uint32_t box_bytes = uint32_t(length) * kRowBytes;
    return matrix_in_shared(tile + k / kRow * box_bytes + k % kRow * kElement, kSwizzle,
                            8 * kRowBytes, kPlain ? box_bytes : 16);
  }
};

template <class T, class Element, int kColumns, bool kTransposedA, bool kTransposedB,
          Swizzle kSwizzle>
__global__ void __launch_bounds__(kThreads)
    gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* c,
         int m, int n, int k) {
#ifdef CONVEXT_SM90A
  using G = Gemm<T, Element, kColumns, kTransposedA, kTransposedB, kSwizzle>;
  unsigned char* a_tiles = dynamic_shared<unsigned char>();
  unsigned char* b_tiles = a_tiles + kStages * G::kBytesA;
  __shared__ uint64_t full[kStages], empty[kStages];
  const int t = threadIdx.x, row = blockIdx.y * kRows, column = blockIdx.x * kColumns;
  const int steps = (k + G::kDepth - 1) / G::kDepth;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_mbarrier(&full[i], 1);
      init_mbarrier(&empty[i], 128);
    }
    publish_mbarriers();
  }
  __syncthreads();
  if (t >= 128) {
    if (t > 128) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      if (step >= kStages) wait_for_phase(&empty[stage], (step / kStages + 1) % 2);
      arrive_expecting(&full[stage], (kRows + kColumns) * G::kDepth * G::kElement);
      G::load(a_tiles + stage * G::kBytesA, a_map, &full[stage], kTransposedA, row, kRows,
              step * G::kDepth);
      G::load(b_tiles + stage * G::kBytesB, b_map, &full[stage], kTransposedB, column, kColumns,
              step * G::kDepth);
    }
    return;
  }
  float d[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    wait_for_phase(&full[stage], step / kStages % 2);
    fence_products();
    for (int i = 0; i < G::kDepth; i += 32 / G::kElement) {  // what one product takes along k
      const uint64_t a = G::operand(a_tiles + stage * G::kBytesA, kTransposedA, kRows, i);
      const uint64_t b = G::operand(b_tiles + stage * G::kBytesB, kTransposedB, kColumns, i);
      multiply<T, kColumns, kTransposedA, kTransposedB>(d, a, b, step > 0 || i > 0);
    }
    commit_products();
    wait_for_products<0>();
    arrive(&empty[stage]);
  }
#pragma unroll
  for (int e = 0; e < kColumns / 2; ++e) {
    const int y = row + t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8;
    const int x = column + e / 4 * 8 + t % 4 * 2 + e % 2;
    if (y < m && x < n) c[size_t(y) * n + x] = d[e];
  }
#endif
}

template <class T, class Element, int kColumns, bool kTransposedA = false,
          bool kTransposedB = false, Swizzle kSwizzle = Swizzle::bytes128>
void check_gemm() {
  using G = Gemm<T, Element, kColumns, kTransposedA, kTransposedB, kSwizzle>;
  const int m = 72, n = kColumns + 8, k = 136;  // multiples of 16 bytes, not of the tiles
  Buffer<Element> a(m * k), b(n * k);
  Buffer<float> c(size_t(m) * n);
  fill(a, 5);
  fill(b, 6);
  const MapElement element = sizeof(Element) == 4                     ? MapElement::float32
                             : std::is_same_v<Element, __nv_bfloat16> ? MapElement::bfloat16
                                                                      : MapElement::float16;
  // A box has one row of the swizzle, and of the other axis all of the tile.
  const auto map_of = [&](const Element* data, bool transposed, int across, int tile) {
    const int inner = transposed ? across : k, outer = transposed ? k : across;
    const uint32_t rows = uint32_t(transposed ? G::kDepth : tile);
    const MapTensor described{element,
                              kSwizzle,
                              data,
                              2,
                              {uint64_t(inner), uint64_t(outer)},
                              {0, uint64_t(inner) * sizeof(Element)},
                              {1, 1}};
    return make_tensor_map(described, MapBox{{uint32_t(G::kRow), rows}});
  };
  launch(gemm<T, Element, kColumns, kTransposedA, kTransposedB, kSwizzle>, dim3(2, 2),
         dim3(kThreads), G::kShared, nullptr, map_of(a.data(), kTransposedA, m, kRows),
         map_of(b.data(), kTransposedB, n, kColumns), c.data(), m, n, k);
  finish();
  for (int y = 0; y < m; ++y) {
    for (int x = 0; x < n; ++x) {
      float sum = 0;
      for (int i = 0; i < k; ++i) {
        sum += to_float(a[kTransposedA ? i * m + y : y * k + i]) *
               to_float(b[kTransposedB ? i * n + x : x * k + i]);
      }
      expect(c[size_t(y) * n + x] == sum, "a product", size_t(y) * n + x);
    }
  }
}

PROBE(wgmma_float16) {
  check_gemm<__half, __half, 64>();
  check_gemm<__half, __half, 256>();
  check_gemm<__half, __half, 96, false, false, Swizzle::bytes64>();
  check_gemm<__half, __half, 32, false, false, Swizzle::bytes32>();
  check_gemm<__half, __half, 64, false, false, Swizzle::none>();
}

PROBE(wgmma_bfloat16) {
  check_gemm<__nv_bfloat16, __nv_bfloat16, 128>();
  check_gemm<__nv_bfloat16, __nv_bfloat16, 16>();
}

PROBE(wgmma_tf32) {
  check_gemm<Tf32, float, 64>();
  check_gemm<Tf32, float, 128, false, false, Swizzle::bytes64>();
  check_gemm<Tf32, float, 32, false, false, Swizzle::none>();
}

PROBE(wgmma_transposed) {
  check_gemm<__half, __half, 128, false, true>();
  check_gemm<__half, __half, 64, true, false>();
  check_gemm<__nv_bfloat16, __nv_bfloat16, 192, true, true>();
  check_gemm<__half, __half, 64, true, true, Swizzle::bytes64>();
  check_gemm<__half, __half, 64, true, true, Swizzle::bytes32>();
  check_gemm<__half, __half, 64, true, true, Swizzle::none>();
}

}  // namespace
}  // namespace probes
