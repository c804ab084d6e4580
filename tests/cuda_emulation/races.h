// Which accesses are ordered by which barriers: only in the race build; races.cpp.
#pragma once

#include <cstddef>
#include <vector>

#include "emulator.h"

namespace emulator {

class SharedMemory;

namespace races {

#if defined(CONVEXT_EMULATOR_RACES)

void begin_launch();
void begin_block(const Block&, const SharedMemory&);
// Accesses to this memory are never checked: stacks.
void ignore(const void* begin, size_t bytes);

// An access that the compiler does not see, by the running thread.
void read(const void* address, size_t bytes, Place);
void write(const void* address, size_t bytes, Place);

// Threads that meet at a barrier.
class Group {
 public:
  void add(int thread) { threads_.push_back(thread); }
  // What any has done is before what any will do.
  void join();

 private:
  std::vector<int> threads_;
};

#else

inline void begin_launch() {}
inline void begin_block(const Block&, const SharedMemory&) {}
inline void ignore(const void*, size_t) {}
inline void read(const void*, size_t, Place) {}
inline void write(const void*, size_t, Place) {}

struct Group {
  void add(int) {}
  void join() {}
};

#endif

}  // namespace races
}  // namespace emulator
