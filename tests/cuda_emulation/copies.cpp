// cp.async: copies to shared memory that land when they are waited for, or at once.
#include <cstring>

#include "scheduler.h"

namespace emulator {
namespace {

// By the C library, whose functions the address sanitizer watches.
void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, size_t(copy.valid));
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, size_t(copy.bytes - copy.valid));
}

}  // namespace

void copy_async(void* to, const void* from, int valid, int bytes, Place place) {
  Fiber& fiber = this_fiber();
  fiber.place = place;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    fail("cp.async: an address is not a multiple of the size", place);
  }
  if (valid < 0 || valid > bytes) fail("cp.async: more valid bytes than are copied", place);
  if (!this_worker().memory.contains(to)) {
    fail("cp.async: the destination is not in shared memory", place);
  }
  // The destination is written at some time from here to the wait, where it is noted again.
  races::read(from, size_t(valid), place);
  races::write(to, size_t(bytes), place);
  const Copy copy{to, from, valid, bytes, fiber.open_group, place};
  // An early copy is kept too: that it was waited for is asked of every schedule.
  if (settings.early) land(copy);
  fiber.copies.push_back(copy);
}

void commit_copies() {
  ++this_fiber().open_group;
}

void wait_for_copies(int latest) {
  Fiber& fiber = this_fiber();
  size_t landed = 0;
  for (; landed < fiber.copies.size(); ++landed) {
    const Copy& copy = fiber.copies[landed];
    if (copy.group >= fiber.open_group - latest) break;
    races::write(copy.to, size_t(copy.bytes), copy.place);
    if (!settings.early) land(copy);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + ptrdiff_t(landed));
}

}  // namespace emulator
