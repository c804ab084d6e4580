// Calls as keys. How a kernel lays its memory out follows from the call's description, which is the
// call with nothing said of its operands but whether they are there.
#pragma once

#include <cstdint>

namespace convext::cpu {

// Stands for an operand in a description.
inline void* presence(const void* operand) {
  static char there;
  return operand ? &there : nullptr;
}

// What a call reads that later ones may find unchanged.
struct Weights {
  const void* data;
  int64_t bytes;
};

template <class... Values>
uint64_t hash_of(Values... values) {
  uint64_t hash = 0;
  const auto add = [&](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15;  // 2^64 / golden ratio (Knuth, TAOCP 3, 6.4)
    hash ^= hash >> 32;
  };
  (add(uint64_t(values)), ...);
  return hash;
}

}  // namespace convext::cpu
