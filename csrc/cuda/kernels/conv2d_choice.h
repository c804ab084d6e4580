// What "auto" means on CUDA: a table of reasons, read from the top.
#pragma once

#include <string_view>

#include "cuda/kernels/conv2d.h"

namespace convext::cuda {

struct Conv2dChoice {
  const Conv2dAlgorithm* algorithm;
  const char* reason;
};

// The first row that fits, whose algorithm does not decline. Goes by the call without its pointers
// and its stream, and never asks the device, so that a network takes the same kernels on every run.
// No algorithm here needs the permission that Winograd's do on the CPU.
Conv2dChoice choose_conv2d_algorithm(const Conv2dCall&, bool winograd_allowed);

// The rows, for documentation and tests. A row's algorithm may be missing from this build.
struct Conv2dChoiceRow {
  std::string_view algorithm;
  bool (*fits)(const Conv2dProblem&, DType);
  const char* reason;
};
int conv2d_choice_count();
const Conv2dChoiceRow& conv2d_choice(int index);

}  // namespace convext::cuda
