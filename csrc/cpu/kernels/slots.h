// How the kernels share a list of work items out among threads.
#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace convext::cpu {

// The first item of a slot's share of a list.
inline int64_t first_item(int64_t slot, int64_t slots, int64_t items) {
  return slot * items / slots;
}

// Calls body(slot, item) for every item. Slots are equal shares of the list, each run by one thread
// with scratch of its own; an item's result must not depend on the slot that computes it.
template <class Body>
void run_slots(int64_t slots, int64_t items, const Body& body) {
  const auto run = [&](int64_t slot) {
    const int64_t end = first_item(slot + 1, slots, items);
    for (int64_t i = first_item(slot, slots, items); i < end; ++i) body(slot, i);
  };
  if (slots == 1) {
    run(0);
  } else {
    parallel_for(slots, run);
  }
}

}  // namespace convext::cpu
