#include "last_algorithm.h"

#include <atomic>

namespace convext {
namespace {

std::atomic<const char*> names[3], reasons[3];

}  // namespace

void record_algorithm(Conv2dPass pass, const char* name, const char* reason) {
  names[int(pass)].store(name, std::memory_order_relaxed);
  reasons[int(pass)].store(reason, std::memory_order_relaxed);
}

const char* last_algorithm(Conv2dPass pass) {
  return names[int(pass)].load(std::memory_order_relaxed);
}

const char* last_reason(Conv2dPass pass) {
  return reasons[int(pass)].load(std::memory_order_relaxed);
}

}  // namespace convext
