// Direct convolution of nchw tensors with many channels: lanes across pixels, both operands laid
// out in panels.
#pragma once

#include "common/arena.h"
#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// Whether there are enough channels to pay for the layout, which one element costs once and each
// channel of the results uses.
bool prefers_panels(const Conv2dCall&);

// Forward without an epilogue, and backward_input. The same sums in the same order, and so the same
// bits, as the other ways of direct convolution.
template <class T>
void compute_panels(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
