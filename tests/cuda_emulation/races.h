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

// Accesses of the running thread that the compiler does not see.
void read(const void* address, size_t bytes, Place);
void write(const void* address, size_t bytes, Place);

// Threads that meet at a barrier: what any has done is before what any will do.
class Group {
 public:
  void add(int thread) { threads_.push_back(thread); }
  void join() const;

 private:
  std::vector<int> threads_;
};

// What the running thread has done is before what those will do that acquire the same phase of the
// same object later.
void release(const void* object, bool phase);
void acquire(const void* object, bool phase);
// The phase begins anew.
void forget(const void* object, bool phase);

#else

inline void begin_launch() {}
inline void begin_block(const Block&, const SharedMemory&) {}
inline void read(const void*, size_t, Place) {}
inline void write(const void*, size_t, Place) {}

struct Group {
  void add(int) {}
  void join() const {}
};

inline void release(const void*, bool) {}
inline void acquire(const void*, bool) {}
inline void forget(const void*, bool) {}

#endif

}  // namespace races
}  // namespace emulator
