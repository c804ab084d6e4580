// How the kernels share a list of work items out among threads.
#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace convext::cpu {

// Calls body(slot, item) for every item. Slots are equal shares of the list, each run by one thread
// with scratch of its own; an item's result must not depend on the slot that computes it.
template <class Body>
void run_slots(int64_t slots, int64_t items, const Body& body) {
  const auto run = [&](int64_t slot) {
    for (int64_t i = slot * items / slots; i < (slot + 1) * items / slots; ++i) body(slot, i);
  };
  if (slots == 1) {
    run(0);
  } else {
    parallel_for(slots, run);
  }
}

}  // namespace convext::cpu
