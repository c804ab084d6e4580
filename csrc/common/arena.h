// Cuts memory into aligned arrays. Built on no memory it only counts, so that the code that lays a
// workspace out is also the code that says how large it must be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

namespace convext {

class Arena {
 public:
  // A cache line of a GPU, where its copies in bulk land; two of a CPU.
  static constexpr int64_t kAlignment = 128;

  // Memory that outlives a call, and whether an earlier call has filled it.
  struct Lasting {
    void* base = nullptr;
    bool filled = false;
  };

  // Workspace of one call, which is all that there is.
  explicit Arena(void* base) : work_{static_cast<char*>(base)} {}
  Arena(void* base, Lasting kept, Lasting packed)
      : work_{static_cast<char*>(base)},
        kept_{static_cast<char*>(kept.base)},
        packed_{static_cast<char*>(packed.base)},
        lasting_(true),
        kept_filled_(kept.filled),
        packed_filled_(packed.filled) {}

  // Null while counting. A size beyond 2^62 bytes makes overflowed() true.
  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(cut(work_, count, sizeof(T)));
  }

  // The same, for what follows from the call's description alone, such as lists of offsets: written
  // only where must_fill_kept(), since calls of the same description share it.
  template <class T>
  T* keep(int64_t count) {
    return reinterpret_cast<T*>(cut(lasting_ ? kept_ : work_, count, sizeof(T)));
  }
  bool must_fill_kept() const { return !counting() && !kept_filled_; }

  // What make() returns, a value that may point to arrays it keeps. Made once.
  template <class Make>
  auto kept(const Make& make) {
    using Value = decltype(make());
    static_assert(std::is_trivially_copyable_v<Value>);
    struct Slot {
      Value value;
      int64_t end;  // of the arrays
    };
    Slot* slot = keep<Slot>(1);
    if (kept_filled_) {
      kept_.used = slot->end;
      return slot->value;
    }
    const Value value = make();
    if (slot) new (slot) Slot{value, kept_.used};
    return value;
  }

  // The same, for what follows from the description and the weights: written only where
  // must_pack(), and there from the weights that the call has.
  template <class T>
  T* pack(int64_t count) {
    return reinterpret_cast<T*>(cut(lasting_ ? packed_ : work_, count, sizeof(T)));
  }
  bool must_pack() const { return !counting() && !packed_filled_; }

  // One equal part for each of `count` workers, each as large as what `part` has counted.
  char* take_parts(int64_t count, const Arena& part) {
    int64_t bytes = 0;
    const bool fits = !part.overflowed_ && !__builtin_mul_overflow(count, part.used(), &bytes);
    return take<char>(fits ? bytes : -1);
  }

  // The first aligned address at or above one that has kAlignment bytes to spare.
  static void* aligned(void* base) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base) + kAlignment - 1;
    return reinterpret_cast<void*>(address - address % kAlignment);
  }

  // Bytes.
  int64_t used() const { return work_.used; }
  int64_t used_kept() const { return kept_.used; }
  int64_t used_packed() const { return packed_.used; }
  bool overflowed() const { return overflowed_; }
  bool counting() const { return work_.base == nullptr; }

 private:
  struct Region {
    char* base = nullptr;
    int64_t used = 0;
  };

  char* cut(Region& region, int64_t count, int64_t size) {
    int64_t bytes = 0;
    if (count < 0 || __builtin_mul_overflow(count, size, &bytes) ||
        __builtin_add_overflow(bytes, kAlignment - 1, &bytes)) {
      overflowed_ = true;
      return nullptr;
    }
    bytes -= bytes % kAlignment;
    char* array = region.base ? region.base + region.used : nullptr;
    if (__builtin_add_overflow(region.used, bytes, &region.used) ||
        region.used > (int64_t(1) << 62)) {
      overflowed_ = true;
      region.used = 0;
    }
    return array;
  }

  Region work_, kept_, packed_;
  bool lasting_ = false;
  bool kept_filled_ = false;
  bool packed_filled_ = false;
  bool overflowed_ = false;
};

}  // namespace convext
