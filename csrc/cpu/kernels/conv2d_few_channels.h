// Direct convolution to few channels: with the vectors' lanes across neighbouring pixels, as in
// conv2d_planes.h, but to rows of channels, which nhwc tensors and epilogues want.
#pragma once

#include "common/arena.h"
#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// Whether so few channels leave so many lanes idle that transposing results pays.
bool prefers_few_channels(const Conv2dCall&);

// Forward, and backward_input without an epilogue. The same sums in the same order, and so the same
// bits, as with lanes across channels.
template <class T>
void compute_few_channels(const Conv2dCall&, Arena& arena);

}  // namespace convext::cpu
