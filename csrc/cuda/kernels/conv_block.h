// Convolution, ReLU and batch norm in one: what a network repeats.
#pragma once

#include "common/arena.h"
#include "common/batch_norm_problem.h"
#include "cuda/kernels/batch_norm.h"
#include "cuda/kernels/conv2d.h"

namespace convext::cuda {

// The two halves describe themselves to their own kernels; what they share is stated in both.
struct ConvBlockCall {
  // Forward, without epilogue. Its output takes the activation: the result of the convolution, or
  // of the ReLU where that comes first. Null where nobody needs it, and eval makes do without.
  Conv2dCall conv;
  const Conv2dAlgorithm* algorithm;
  // Of what lies between: problem, parameters, eps, relu and output; mean and var are results in
  // training. Its input is the activation.
  BatchNormCall norm;
};

// On a counting arena each only lays out its workspace, by the call without its pointers but for
// whether conv has an output. The output has elements.
void conv_block_train(const ConvBlockCall&, Arena&);
void conv_block_eval(const ConvBlockCall&, Arena&);
// Backward through norm and ReLU is batch_norm_backward.

}  // namespace convext::cuda
