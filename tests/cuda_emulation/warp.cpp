// What the lanes of a warp do together: shuffles, votes, matrices.
#include <bit>
#include <cstring>

#include "factors.h"
#include "scheduler.h"

namespace emulator {

void warp_operation(uint32_t mask, void* operand, Operation operation, Place place) {
  Worker& worker = this_worker();
  Fiber& fiber = this_fiber();
  Warp& warp = worker.warp_of(fiber);
  fiber.place = place;
  const uint32_t lane = 1u << fiber.lane;
  if (!(mask & lane)) fail("a warp operation's mask lacks the lane that calls it", place);

  // Lanes may be on ways of their own, with masks of their own, before they meet others again.
  int found = 0;
  while (found < warp.gatherings && warp.gathering[found].mask != mask) ++found;
  Gathering& g = warp.gathering[found];
  if (found == warp.gatherings) {
    g = {.mask = mask, .arrived = 0, .place = place, .operands = {}};
    ++warp.gatherings;
  } else if (!same(g.place, place)) {
    fail("lanes of one mask are at different warp operations", place);
  }

  g.operands[fiber.lane] = operand;
  g.arrived |= lane;
  if (g.arrived != mask) {
    worker.wait(State::in_warp_operation);
    return;
  }
  if (operation) operation(mask, g.operands);
  for (uint32_t others = mask & ~lane; others; others &= others - 1) {
    worker.wake(worker.fiber(fiber.warp * 32 + std::countr_zero(others)));
  }
  g = warp.gathering[--warp.gatherings];
}

void warp_barrier(uint32_t mask, Place place) {
  warp_operation(
      mask, nullptr,
      [](uint32_t mask, void* const(&)[32]) {
        races::Group group;
        for (; mask; mask &= mask - 1) {
          group.add(current->warp * 32 + std::countr_zero(mask));
        }
        group.join();
      },
      place);
}

// Other operations order no accesses to memory, except for what their lanes exchange.

void shuffle(uint32_t mask, void* value, int bytes, int source, Place place) {
  struct Operand {
    void* value;
    int bytes, source;
  } operand{value, bytes, source};
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask lacks", place);
  if (bytes > 16) fail("a shuffle of more than 16 bytes", place);
  warp_operation(
      mask, &operand,
      [](uint32_t mask, void* const(&operands)[32]) {
        char values[32][16];
        for (uint32_t m = mask; m; m &= m - 1) {
          const int lane = std::countr_zero(m);
          const auto& from = *static_cast<const Operand*>(operands[lane]);
          std::memcpy(values[lane], from.value, size_t(from.bytes));
        }
        for (uint32_t m = mask; m; m &= m - 1) {
          const auto& to = *static_cast<const Operand*>(operands[std::countr_zero(m)]);
          std::memcpy(to.value, values[to.source], size_t(to.bytes));
        }
      },
      place);
}

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  uint32_t vote = predicate;
  warp_operation(
      mask, &vote,
      [](uint32_t mask, void* const(&operands)[32]) {
        uint32_t votes = 0;
        for (uint32_t m = mask; m; m &= m - 1) {
          const int lane = std::countr_zero(m);
          votes |= *static_cast<const uint32_t*>(operands[lane]) << lane;
        }
        for (uint32_t m = mask; m; m &= m - 1) {
          *static_cast<uint32_t*>(operands[std::countr_zero(m)]) = votes;
        }
      },
      place);
  return vote;
}

uint32_t match_any(uint32_t mask, const void* value, int bytes, Place place) {
  struct Operand {
    const void* value;
    int bytes;
    uint32_t equal;
  } operand{value, bytes, 0};
  warp_operation(
      mask, &operand,
      [](uint32_t mask, void* const(&operands)[32]) {
        for (uint32_t m = mask; m; m &= m - 1) {
          auto& mine = *static_cast<Operand*>(operands[std::countr_zero(m)]);
          for (uint32_t n = mask; n; n &= n - 1) {
            const int lane = std::countr_zero(n);
            const auto& other = *static_cast<const Operand*>(operands[lane]);
            if (!std::memcmp(mine.value, other.value, size_t(mine.bytes))) mine.equal |= 1u << lane;
          }
        }
      },
      place);
  return operand.equal;
}

// --------------------------------------------------------------------------------------------------
// ldmatrix

namespace {

struct LoadOperand {
  uint32_t* matrices;
  const char* row;
};

const char* row_of(void* const (&operands)[32], int matrix, int row) {
  return static_cast<const LoadOperand*>(operands[matrix * 8 + row])->row;
}

void load_rows(uint32_t, void* const (&operands)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* to = static_cast<LoadOperand*>(operands[lane])->matrices;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&to[i], row_of(operands, i, lane / 4) + lane % 4 * 4, 4);
    }
  }
}

void load_columns(uint32_t, void* const (&operands)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* to = static_cast<LoadOperand*>(operands[lane])->matrices;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        std::memcpy(&pair[e], row_of(operands, i, lane % 4 * 2 + e) + lane / 4 * 2, 2);
      }
      std::memcpy(&to[i], pair, 4);
    }
  }
}

}  // namespace

void load_matrices(uint32_t* matrices, const void* row, bool transposed, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix: a row's address is not a multiple of 16", place);
  }
  if (!this_worker().memory.contains(row)) fail("ldmatrix: a row is not in shared memory", place);
  races::read(row, 16, place);
  LoadOperand operand{matrices, static_cast<const char*>(row)};
  warp_operation(~0u, &operand, transposed ? load_columns : load_rows, place);
}

// --------------------------------------------------------------------------------------------------
// Tensor cores. Products are exact in float: factors have at most 11 bits. Here they are added in
// float, one after the other along k, and their sum is added to d. A real tensor core adds the
// products of a step and d at once, after shifting all to the largest exponent and cutting off what
// falls below, with a few bits more than a float has; how many, and how many products a step has,
// differ between generations. Errors of both are of the same size, a float's last bit or two for
// each step, and tests compare with double precision by bounds above either.

namespace {

using Floats = float __attribute__((vector_size(32)));

struct MultiplyOperand {
  Factor factor;
  float* d;
  const uint32_t *a, *b;
};

// What all lanes gave, as matrices.
template <int K>
struct Factors {
  float a[16][K];
  alignas(32) float b[K][8];
};

Factors<16> halves(void* const (&operands)[32], Factor factor) {
  uint16_t a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MultiplyOperand*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[group + i % 2 * 8][pair + i / 2 * 8], &in.a[i], 4);
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = uint16_t(in.b[i]);
      b[pair + i * 8 + 1][group] = uint16_t(in.b[i] >> 16);
    }
  }
  Factors<16> all;
  widen(factor, a[0], all.a[0], 256);
  widen(factor, b[0], all.b[0], 128);
  return all;
}

Factors<8> tf32s(void* const (&operands)[32], Factor) {
  Factors<8> all;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MultiplyOperand*>(operands[lane]);
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) {
      all.a[group + i % 2 * 8][k + i / 2 * 4] = cut_to_tf32(in.a[i]);
    }
    for (int i = 0; i < 2; ++i) all.b[k + i * 4][group] = cut_to_tf32(in.b[i]);
  }
  return all;
}

template <int K>
void multiply(const Factors<K>& factors, void* const (&operands)[32]) {
  alignas(32) float d[16][8];
  for (int row = 0; row < 16; ++row) {
    Floats sum{};
    for (int k = 0; k < K; ++k) {
      sum += factors.a[row][k] * *reinterpret_cast<const Floats*>(factors.b[k]);
    }
    *reinterpret_cast<Floats*>(d[row]) = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = static_cast<const MultiplyOperand*>(operands[lane])->d;
    for (int e = 0; e < 4; ++e) to[e] += d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  }
}

template <Factor kFactor>
void multiply_all(uint32_t, void* const (&operands)[32]) {
  if constexpr (kFactor == Factor::tf32) {
    multiply(tf32s(operands, kFactor), operands);
  } else {
    multiply(halves(operands, kFactor), operands);
  }
}

}  // namespace

void multiply_matrices(Factor factor, float* d, const uint32_t* a, const uint32_t* b, Place place) {
  MultiplyOperand operand{factor, d, a, b};
  Operation operation = multiply_all<Factor::float16>;
  if (factor == Factor::bfloat16) operation = multiply_all<Factor::bfloat16>;
  if (factor == Factor::tf32) operation = multiply_all<Factor::tf32>;
  warp_operation(~0u, &operand, operation, place);
}

uint32_t round_to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) {  // infinite, or NaN, which must stay one
    return bits & 0x7fffffu ? 0x7fffffffu : bits;
  }
  return (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace emulator
