#include "cuda/glue.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "cpu/autotune.h"

namespace convext::cuda {
namespace {

// Of the current device: 80 for 8.0. Asked once for each device, which does not wait for it.
int compute_capability() {
  static std::atomic<int> known[C10_COMPILE_TIME_MAX_GPUS];
  const c10::DeviceIndex device = c10::cuda::current_device();
  std::atomic<int>& capability = known[device];
  if (capability.load(std::memory_order_relaxed) == 0) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    capability.store(10 * major + minor, std::memory_order_relaxed);
  }
  return capability.load(std::memory_order_relaxed);
}

Stream current_stream() {
  return c10::cuda::getCurrentCUDAStream().stream();
}

}  // namespace

// What torch says of cuDNN's convolutions holds for ours: torch.backends.cudnn.conv.fp32_precision,
// and the older torch.backends.cudnn.allow_tf32.
void Device::describe(Conv2dCall& call) {
  call.tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  call.compute_capability = compute_capability();
  call.stream = current_stream();
}

void Device::describe(BatchNormCall& call) {
  call.stream = current_stream();
}

Conv2dChoice Device::choose(const char* op, const Conv2dCall& call, bool winograd_allowed) {
  TORCH_CHECK(!cpu::autotuning(), op,
              "(): convext.autotune() measures on the CPU only; leave its block, or call "
              "convext.autotune(False), for convolutions on CUDA");
  return choose_conv2d_algorithm(call, winograd_allowed);
}

}  // namespace convext::cuda
