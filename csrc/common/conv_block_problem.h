// A convolution, a ReLU and a batch norm, in one of two orders, as a value.
#pragma once

#include "common/batch_norm_problem.h"
#include "common/conv2d_problem.h"

namespace convext {

struct ConvBlockProblem {
  Conv2dProblem conv;
  Relu relu;  // before_norm or after_norm

  BatchNormProblem norm() const {
    return {conv.batch, conv.out_channels, conv.out_height() * conv.out_width()};
  }
};

}  // namespace convext
