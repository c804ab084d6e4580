#include "last_algorithm.h"

#include <atomic>

namespace convext {
namespace {

std::atomic<const char*> recorded[3];

}  // namespace

void record_algorithm(Conv2dPass pass, const char* name) {
  recorded[int(pass)].store(name, std::memory_order_relaxed);
}

const char* last_algorithm(Conv2dPass pass) {
  return recorded[int(pass)].load(std::memory_order_relaxed);
}

}  // namespace convext
