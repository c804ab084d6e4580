// The emulator's own view of a block: its fibers, warps and barriers, and who may run.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "context.h"
#include "emulator.h"
#include "hopper.h"
#include "races.h"
#include "shared_memory.h"

namespace emulator {

struct Settings {
  int order;
  bool early;
  int threads;
};
extern Settings settings;  // of the launch that runs

inline bool same(const Place& a, const Place& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

enum class State : uint8_t {
  ready,
  at_barrier,
  in_warp_operation,
  in_warpgroup,
  at_mbarrier,
  done
};

// A linear congruential generator, D. Knuth's MMIX; <random> takes longer to compile than the rest.
class Random {
 public:
  using result_type = uint32_t;
  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return ~0u; }

  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u + 1; }
  uint32_t operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }

 private:
  uint64_t state_ = 1;
};

struct Copy {
  void* to;
  const void* from;
  int valid, bytes;
  int group;
  Place place;
};

struct Fiber : Thread {
  Context context;
  State state;
  Place place;  // of what it waits in, or last did
  int barrier;  // the number of the one it waits at
  // cp.async: issued and not landed, oldest first; the group that is open, and how many are landed.
  std::vector<Copy> copies;
  int open_group;
  const uint64_t* mbarrier;  // that it waits at
  // wgmma: the group that is open, and whether a fence came after the last wait.
  int open_products;
  bool products_fenced;
};

// Says what its mbarrier waits for.
[[noreturn]] void fail_at_mbarrier(const Fiber&);

struct Barrier {
  int expected, arrived;
  int trues;   // threads that came with a true predicate
  int result;  // trues, of the last time that all had come
  Place place;
};

// An operation that some lanes of its mask have come to.
struct Gathering {
  uint32_t mask, arrived;
  Place place;
  void* operands[32];
};

struct Warp {
  uint32_t ready;  // lanes that may run
  int gatherings;
  std::array<Gathering, 32> gathering;
};

struct IssuedProduct {
  Product product;
  int group;
  float* d[128];  // by thread
};

// Four warps that multiply together.
struct Warpgroup {
  int arrived;
  Place place;
  std::vector<IssuedProduct> issued;  // and not waited for
};

// An OS thread's part: runs one block after another.
class Worker : public Block {
 public:
  ~Worker();

  void begin_launch(void (*body)(const void*), const void* argument, dim3 grid, dim3 block,
                    size_t shared_bytes);
  void run_block(uint64_t number);

  // The running fiber waits, in the given state, until another one wakes it.
  void wait(State);
  void wake(Fiber&);

  Fiber& fiber(int number) const { return *fibers_[number]; }
  Warp& warp_of(const Fiber& fiber) { return warps_[fiber.warp]; }
  Warpgroup& warpgroup_of(const Fiber& fiber) { return warpgroups_[fiber.warp / 4]; }
  Barrier& named_barrier(int number) { return barriers_[number]; }

  SharedMemory memory;
  std::vector<TensorCopy> tensor_copies;  // issued and not landed
  Random random;
  // Which block of the launch, by the order in which they are handed out, is in hand.
  std::atomic<uint64_t> position{~uint64_t{0}};
  uint64_t switches = 0;

 private:
  static void entry();
  void make_fibers(int count);
  int next_lane(const Warp&);
  bool land_tensor_copy();
  [[noreturn]] void report_deadlock();

  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  std::vector<Warpgroup> warpgroups_;
  std::array<Barrier, 16> barriers_;
  Context scheduler_;
  int live_ = 0;
};

inline Fiber& this_fiber() {
  return *static_cast<Fiber*>(current);
}
inline Worker& this_worker() {
  return *static_cast<Worker*>(current->block);
}

}  // namespace emulator
