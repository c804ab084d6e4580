// Sums products where the operands lie. Takes every problem.
#include "cuda/kernels/conv2d_direct.h"

namespace convext::cuda {

void conv2d_direct(const Conv2dCall& call, Arena& arena) {
  if (call.pass == Conv2dPass::backward_weight) return direct_weight(call, arena);
  if (arena.counting()) return;
  prefers_few_channels(call) ? direct_few_channels(call) : direct_gather(call);
}

}  // namespace convext::cuda
