// Cuts one workspace into aligned arrays. Built on no memory it only counts, so that the code that
// lays a workspace out is also the code that says how large it must be.
#pragma once

#include <cstddef>
#include <cstdint>

namespace convext::cpu {

class Arena {
 public:
  static constexpr int64_t kAlignment = 64;  // a cache line, and the widest vector

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  // Null while counting. A size beyond 2^62 bytes makes overflowed() true.
  template <class T>
  T* take(int64_t count) {
    int64_t bytes = 0;
    if (count < 0 || __builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) ||
        __builtin_add_overflow(bytes, kAlignment - 1, &bytes)) {
      overflowed_ = true;
      return nullptr;
    }
    bytes -= bytes % kAlignment;
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    if (__builtin_add_overflow(used_, bytes, &used_) || used_ > (int64_t(1) << 62)) {
      overflowed_ = true;
      used_ = 0;
    }
    return array;
  }

  // One equal part for each of `count` workers, each as large as what `part` has counted.
  char* take_parts(int64_t count, const Arena& part) {
    int64_t bytes = 0;
    const bool fits = !part.overflowed_ && !__builtin_mul_overflow(count, part.used_, &bytes);
    return take<char>(fits ? bytes : -1);
  }

  // The first aligned address at or above one that has kAlignment bytes to spare.
  static void* aligned(void* base) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base) + kAlignment - 1;
    return reinterpret_cast<void*>(address - address % kAlignment);
  }

  int64_t used() const { return used_; }
  bool overflowed() const { return overflowed_; }
  bool counting() const { return base_ == nullptr; }

 private:
  char* base_;
  int64_t used_ = 0;
  bool overflowed_ = false;
};

}  // namespace convext::cpu
