// Barriers that lie in shared memory and also count bytes.
#include <cstdio>

#include "hopper.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr uint32_t kMark = 0x15a;

// In the 8 bytes of the barrier, whose contents are the hardware's own affair.
struct Mbarrier {
  int32_t bytes;  // expected and not come; negative while more have come
  uint32_t parity : 1, count : 11, pending : 11, mark : 9;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

Mbarrier& checked(uint64_t* barrier, Place place) {
  auto& m = *reinterpret_cast<Mbarrier*>(barrier);
  if (m.mark != kMark) fail("mbarrier: used before it was initialised", place);
  return m;
}

// Ends the phase where nothing is outstanding.
void settle(uint64_t* barrier, Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.count;
  m.parity ^= 1;
  races::forget(barrier, m.parity);
  Worker& worker = this_worker();
  for (int i = 0; i < worker.threads; ++i) {
    Fiber& fiber = worker.fiber(i);
    if (fiber.state == State::at_mbarrier && fiber.mbarrier == barrier) worker.wake(fiber);
  }
}

}  // namespace

void init_mbarrier(uint64_t* barrier, uint32_t arrivals, Place place) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("mbarrier: an address is not a multiple of 8", place);
  }
  if (!this_worker().memory.contains(barrier)) fail("mbarrier: not in shared memory", place);
  if (arrivals < 1 || arrivals > 1024) fail("mbarrier: counts 1 to 1024 arrivals here", place);
  auto& m = *reinterpret_cast<Mbarrier*>(barrier);
  m = {.bytes = 0, .parity = 0, .count = arrivals, .pending = arrivals, .mark = kMark};
  races::forget(barrier, false);
  races::forget(barrier, true);
}

void arrive_at_mbarrier(uint64_t* barrier, uint32_t expected_bytes, Place place) {
  Mbarrier& m = checked(barrier, place);
  if (m.pending == 0) fail("mbarrier: more threads arrive than it counts", place);
  races::release(barrier, m.parity);
  m.bytes += int32_t(expected_bytes);
  --m.pending;
  settle(barrier, m);
}

void wait_for_phase(uint64_t* barrier, bool parity, Place place) {
  Mbarrier& m = checked(barrier, place);
  Fiber& fiber = this_fiber();
  fiber.place = place;
  if (m.parity == parity) {
    fiber.mbarrier = barrier;
    this_worker().wait(State::at_mbarrier);
  }
  races::acquire(barrier, parity);
}

void announce_bytes(uint64_t* barrier, Place place) {
  const Mbarrier& m = checked(barrier, place);
  races::release(barrier, m.parity);
}

void complete_bytes(uint64_t* barrier, uint32_t bytes, Place place) {
  Mbarrier& m = checked(barrier, place);
  m.bytes -= int32_t(bytes);
  settle(barrier, m);
}

void fail_at_mbarrier(const Fiber& fiber) {
  const auto& m = *reinterpret_cast<const Mbarrier*>(fiber.mbarrier);
  char text[160];
  std::snprintf(text, sizeof text,
                "deadlock: waits at an mbarrier whose phase does not end: %d arrivals and %d bytes "
                "are outstanding",
                int(m.pending), int(m.bytes));
  fail(text, fiber.place);
}

}  // namespace emulator
