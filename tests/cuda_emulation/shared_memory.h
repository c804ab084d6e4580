// Shared memory of the block that an OS thread runs: poisoned before every block with bytes 0xff,
// which are NaN in every format.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace emulator {

class SharedMemory {
 public:
  ~SharedMemory();

  void begin_launch(size_t dynamic_bytes);
  void begin_block();

  unsigned char* dynamic() const { return dynamic_; }
  // Whether an address lies in static or dynamic shared memory, as far as is known.
  bool contains(const void* address) const;

 private:
  void find_static();
  void poison_static();
  void find_written();

  unsigned char* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0, dynamic_room_ = 0;
  // Static shared memory is thread_local (cuda_language.h), so it lies in the block of memory that
  // this library has for each OS thread. All kernels' variables lie there; those of the kernel that
  // runs are what its blocks have written.
  unsigned char* static_ = nullptr;
  size_t static_bytes_ = 0;
  std::vector<bool> grain_written_;
  std::vector<std::pair<size_t, size_t>> written_;  // the same: begin, end
  size_t blocks_ = 0;                               // of this launch
};

}  // namespace emulator
