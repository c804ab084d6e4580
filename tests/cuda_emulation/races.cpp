// Finds accesses that nothing orders. Kernels are compiled with -fsanitize=thread, which makes the
// compiler call a function at every load and store; those functions are here, in the place of that
// sanitizer's library, because the threads are fibers, what orders them is known exactly, and
// blocks must count as unordered although one runs after the other.
//
// The method is that of C. Flanagan and S. Freund, "FastTrack: efficient and precise dynamic race
// detection" (2009): every thread has a clock of all threads of its block, every byte remembers the
// last write and some reads, by thread and time. An access is ordered after an earlier one if the
// thread's clock has reached that time. A byte remembers two reads, the newest that are not ordered
// among themselves, so that a write after very many reads may go unreported.
//
// Atomic operations race with others, not among themselves, and order nothing.
#include "races.h"

#if defined(CONVEXT_EMULATOR_RACES)

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "scheduler.h"

namespace emulator::races {
namespace {

constexpr int kMostThreads = 1024;
constexpr uintptr_t kPageBytes = 256;
constexpr size_t kMostPages = 1 << 15;  // 300 MiB, which are kept for the next launch

using Clock = std::array<uint32_t, kMostThreads>;

struct Access {
  uint32_t time;  // by the clock of its thread; 0: none
  uint32_t block : 21, thread : 10, atomic : 1;
  uint32_t where;  // an index of `places`
};

struct Byte {
  Access write, reads[2];
};

struct Page {
  uint64_t launch;
  Byte bytes[kPageBytes];
};

// Where in the kernel: the address of an instruction, or file and line.
struct Where {
  const void* instruction;
  const char* file;
  unsigned line;
  bool operator==(const Where&) const = default;
};

struct Hash {
  size_t operator()(const Where& w) const {
    return reinterpret_cast<size_t>(w.instruction) + reinterpret_cast<size_t>(w.file) + w.line;
  }
};

struct Book {
  uint64_t launch = 0;
  uint32_t block = 0;  // of this launch, from 1
  std::vector<uint3> blocks;
  const SharedMemory* shared = nullptr;
  std::vector<Clock> clocks{kMostThreads};
  std::map<std::pair<const void*, bool>, std::unique_ptr<Clock>> objects;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::array<std::pair<uintptr_t, Page*>, 1024>
      recent{};  // pages, by the lowest bits of the number
  std::vector<Where> places{1};
  std::unordered_map<Where, uint32_t, Hash> place_numbers;
  std::array<std::pair<Where, uint32_t>, 4096> recent_places{};  // by the lowest bits of the hash

  Book() {
    for (int t = 0; t < kMostThreads; ++t) clocks[t][t] = 1;
  }
};

Book& book() {
  static Book& book = *new Book;
  return book;
}

Byte* bytes_at(uintptr_t address) {
  Book& b = book();
  const uintptr_t number = address / kPageBytes;
  auto& [known, page] = b.recent[number % b.recent.size()];
  if (!page || known != number) {
    auto& owned = b.pages[number];
    if (!owned) owned = std::make_unique<Page>();
    known = number;
    page = owned.get();
  }
  if (page->launch != b.launch) {
    std::memset(page->bytes, 0, sizeof page->bytes);
    page->launch = b.launch;
  }
  return page->bytes + address % kPageBytes;
}

uint32_t number_of(const Where& where) {
  Book& b = book();
  auto& [known, number] = b.recent_places[Hash()(where) % b.recent_places.size()];
  if (number && known == where) return number;
  auto [entry, added] = b.place_numbers.try_emplace(where, uint32_t(b.places.size()));
  if (added) b.places.push_back(where);
  known = where;
  return number = entry->second;
}

// "file:line", by the debugging information of the library that the instruction is in.
std::string name_of(const Where& where) {
  if (where.file) return std::string(where.file) + ":" + std::to_string(where.line);
  Dl_info module;
  if (!dladdr(where.instruction, &module)) return "?";
  const auto offset =
      static_cast<const char*>(where.instruction) - static_cast<const char*>(module.dli_fbase) - 1;
  char command[4096], line[2048] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%llx 2>/dev/null", module.dli_fname,
                static_cast<unsigned long long>(offset));
  if (FILE* output = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, output)) line[0] = '\0';
    pclose(output);
  }
  const std::string name(line, std::strcspn(line, "\n ("));
  return name.empty() ? "?" : name;
}

[[noreturn]] void report(const Access& earlier, const Access& now, bool earlier_writes,
                         bool writes) {
  const Book& b = book();
  const Block& block = *current->block;
  const uint3 other = b.blocks[earlier.block];
  const uint3 thread = static_cast<const Worker&>(block).fiber(int(earlier.thread)).index;
  const bool same_block = earlier.block == now.block;
  char text[4096];
  std::snprintf(
      text, sizeof text, "race: %s what block (%u,%u,%u) thread (%u,%u,%u) %s at %s, and %s",
      writes ? "writes" : "reads", other.x, other.y, other.z, thread.x, thread.y, thread.z,
      earlier_writes ? "wrote" : "read", name_of(b.places[earlier.where]).c_str(),
      same_block ? "no barrier is between" : "nothing orders blocks");
  const std::string here = name_of(b.places[now.where]);
  fail(text, here.c_str());
}

// What is remembered of shared memory is of the running block.
bool remembered(const Access& access, const Access& now, bool shared) {
  return access.time && !(shared && access.block != now.block);
}

bool ordered(const Access& earlier, const Access& now, const Clock& clock) {
  return earlier.block == now.block && clock[earlier.thread] >= earlier.time;
}

void access(uintptr_t address, size_t bytes, bool writes, bool atomic, const Where& where) {
  if (!current) return;  // the host
  const Fiber& fiber = this_fiber();
  const auto stack = reinterpret_cast<uintptr_t>(fiber.context.stack);
  if (address - stack < fiber.context.stack_bytes) return;
  Book& b = book();
  const bool shared = b.shared->contains(reinterpret_cast<const void*>(address));
  const Clock& clock = b.clocks[current->number];
  const Access now{clock[current->number], b.block & 0x1fffff, uint32_t(current->number) & 0x3ff,
                   atomic, number_of(where)};
  for (const uintptr_t end = address + bytes; address < end; ++address) {
    Byte& byte = *bytes_at(address);
    if (remembered(byte.write, now, shared) && !(byte.write.atomic && atomic) &&
        !ordered(byte.write, now, clock)) {
      report(byte.write, now, true, writes);
    }
    if (writes) {
      for (const Access& read : byte.reads) {
        if (remembered(read, now, shared) && !(read.atomic && atomic) &&
            !ordered(read, now, clock)) {
          report(read, now, false, true);
        }
      }
      byte = {now, {}};
      continue;
    }
    // In the place of a read that this one is ordered after, or of the older one.
    Access& first = byte.reads[0];
    Access& second = byte.reads[1];
    if (!remembered(first, now, shared) || ordered(first, now, clock)) {
      first = now;
    } else if (!remembered(second, now, shared) || ordered(second, now, clock)) {
      second = now;
    } else {
      first = second;
      second = now;
    }
  }
}

void merge(Clock& into, const Clock& from) {
  const int threads = current->block->threads;
  for (int t = 0; t < threads; ++t) into[t] = std::max(into[t], from[t]);
}

Clock& clock_of(const void* object, bool phase) {
  auto& clock = book().objects[{object, phase}];
  if (!clock) clock = std::make_unique<Clock>();
  return *clock;
}

}  // namespace

void begin_launch() {
  Book& b = book();
  if (b.pages.size() > kMostPages) {
    b.pages.clear();
    b.recent = {};
  }
  ++b.launch;
  b.block = 0;
  b.blocks.assign(1, {});
}

void begin_block(const Block& block, const SharedMemory& shared) {
  Book& b = book();
  ++b.block;
  b.blocks.push_back(block.index);
  // Clocks go on: what another block did is told by its number.
  b.shared = &shared;
  b.objects.clear();
}

void read(const void* address, size_t bytes, Place place) {
  access(reinterpret_cast<uintptr_t>(address), bytes, false, false,
         {nullptr, place.file_name(), unsigned(place.line())});
}

void write(const void* address, size_t bytes, Place place) {
  access(reinterpret_cast<uintptr_t>(address), bytes, true, false,
         {nullptr, place.file_name(), unsigned(place.line())});
}

void Group::join() const {
  Book& b = book();
  Clock all{};
  for (int t : threads_) merge(all, b.clocks[t]);
  for (int t : threads_) {
    merge(b.clocks[t], all);
    ++b.clocks[t][t];
  }
}

void release(const void* object, bool phase) {
  Clock& mine = book().clocks[current->number];
  merge(clock_of(object, phase), mine);
  ++mine[current->number];
}

void acquire(const void* object, bool phase) {
  merge(book().clocks[current->number], clock_of(object, phase));
}

void forget(const void* object, bool phase) {
  book().objects.erase({object, phase});
}

}  // namespace emulator::races

// --------------------------------------------------------------------------------------------------
// What the compiler calls; see gcc/sanitizer.def.

namespace {

void load(const void* address, size_t bytes, const void* instruction) {
  emulator::races::access(reinterpret_cast<uintptr_t>(address), bytes, false, false,
                          {instruction, nullptr, 0});
}

void store(const void* address, size_t bytes, const void* instruction) {
  emulator::races::access(reinterpret_cast<uintptr_t>(address), bytes, true, false,
                          {instruction, nullptr, 0});
}

void update(const void* address, size_t bytes, const void* instruction) {
  emulator::races::access(reinterpret_cast<uintptr_t>(address), bytes, true, true,
                          {instruction, nullptr, 0});
}

}  // namespace

#define CALLER __builtin_return_address(0)
#define ACCESS_OF(bytes)                                   \
  void __tsan_read##bytes(const void* address) {           \
    load(address, bytes, CALLER);                          \
  }                                                        \
  void __tsan_write##bytes(void* address) {                \
    store(address, bytes, CALLER);                         \
  }                                                        \
  void __tsan_unaligned_read##bytes(const void* address) { \
    load(address, bytes, CALLER);                          \
  }                                                        \
  void __tsan_unaligned_write##bytes(void* address) {      \
    store(address, bytes, CALLER);                         \
  }
// The integer atomics of cuda_language.h are made of these two.
#define ATOMIC_OF(bits)                                                                          \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int order) { \
    update(const_cast<const uint##bits##_t*>(address), bits / 8, CALLER);                        \
    return __atomic_load_n(address, order);                                                      \
  }                                                                                              \
  bool __tsan_atomic##bits##_compare_exchange_strong(                                            \
      volatile uint##bits##_t* address, uint##bits##_t* expected, uint##bits##_t desired,        \
      int success, int failure) {                                                                \
    update(const_cast<const uint##bits##_t*>(address), bits / 8, CALLER);                        \
    return __atomic_compare_exchange_n(address, expected, desired, false, success, failure);     \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
ACCESS_OF(1)
ACCESS_OF(2)
ACCESS_OF(4)
ACCESS_OF(8)
ACCESS_OF(16)
void __tsan_read_range(const void* address, size_t bytes) {
  load(address, bytes, CALLER);
}
void __tsan_write_range(void* address, size_t bytes) {
  store(address, bytes, CALLER);
}
ATOMIC_OF(8)  // of static variables of functions on the host
ATOMIC_OF(32)
ATOMIC_OF(64)
}

#endif
