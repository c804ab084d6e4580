// Depthwise convolution of nchw tensors with the vectors' lanes along the rows of a plane.
#pragma once

#include "common/arena.h"
#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// Whether lanes along rows do this call better than lanes across channels, for which nchw tensors
// are transposed. Short rows leave lanes idle.
bool depthwise_prefers_planes(const Conv2dCall&);

// The first two passes give the same sums in the same order as with lanes across channels.
void conv2d_depthwise_planes(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
