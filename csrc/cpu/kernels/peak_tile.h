// Nothing but fused multiply-adds (see VectorKernels::fma_loop). Included by tiles.h only.
#pragma once

template <class T>
int64_t fma_loop(int64_t steps, T* sums) {
  using V = Vec<T>;
  // Independent sums: above the 8 to 10 that hide the latency of two units, and few enough for 16
  // registers. Each starts elsewhere, so that no two are one, and ends near 2.
  constexpr int kChains = 12;
  V sum[kChains];
  CONVEXT_UNROLL
  for (int i = 0; i < kChains; ++i) sum[i] = V::broadcast(T(i));
  const V half = V::broadcast(T(0.5)), one = V::broadcast(T(1));
  for (int64_t step = 0; step < steps; ++step) {
    CONVEXT_UNROLL
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], half, one);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = add(sum[0], sum[i]);
  sum[0].store(sums);
  return steps * kChains * V::lanes * 2;
}
