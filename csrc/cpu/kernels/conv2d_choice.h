// What "auto" means: a table of reasons, read from the top.
#pragma once

#include <string_view>

#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

struct Conv2dChoice {
  const Conv2dAlgorithm* algorithm;
  const char* reason;
};

// The first row that fits, whose algorithm does not decline. Winograd's algorithms, whose error is
// larger than a sum's, take part only where they are allowed. Never asks for the threads or the
// ISA, so that neither changes a result's bits.
Conv2dChoice choose_conv2d_algorithm(const Conv2dCall&, bool winograd_allowed);

// Whether "auto" needs permission for it.
bool is_winograd(const Conv2dAlgorithm&);

// The rows, for documentation and tests. A row's algorithm may be missing from this build.
struct Conv2dChoiceRow {
  std::string_view algorithm;
  bool (*fits)(const Conv2dProblem&, Conv2dPass, DType, Layout);
  const char* reason;
};
int conv2d_choice_count();
const Conv2dChoiceRow& conv2d_choice(int index);

}  // namespace convext::cpu
