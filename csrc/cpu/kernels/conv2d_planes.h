// Direct convolution of nchw tensors with the vectors' lanes across neighbouring pixels.
#pragma once

#include "common/arena.h"
#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// Whether lanes across pixels do this call better than lanes across channels: filters are read
// where they are and results written where they belong, with nothing transposed, but short rows of
// pixels leave lanes idle.
bool prefers_planes(const Conv2dCall&);

// Forward without an epilogue, and backward_input. The same sums in the same order, and so the same
// bits, as with lanes across channels.
template <class T>
void compute_planes(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
