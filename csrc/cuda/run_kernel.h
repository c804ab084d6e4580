// Runs a kernel with the memory it asks for, which is the current stream's of torch's caching
// allocator: no call waits for the device, and a CUDA graph captures the memory with the kernels.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/Exception.h>

#include <stdexcept>

#include "common/arena.h"

namespace convext::cuda {

// What fails where a kernel is laid out or launched becomes an error of the op. A kernel that fails
// later shows, as every CUDA error, in a later call.
template <class Call>
void run_kernel(const char* op, const Call& call, void (*kernel)(const Call&, Arena&)) {
  Arena counter(nullptr);
  kernel(call, counter);
  TORCH_CHECK(!counter.overflowed(), op,
              "(): needs a workspace larger than the address space for this problem");
  c10::DataPtr workspace;
  if (counter.used() > 0) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(size_t(counter.used()));
  }
  // An arena on no memory would count again.
  static char nothing;
  Arena arena(workspace ? workspace.get() : &nothing);
  try {
    kernel(call, arena);
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK(false, op, "(): ", error.what());
  }
}

}  // namespace convext::cuda
