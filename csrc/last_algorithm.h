// Which algorithm computed each pass of the last convolutions, and why: for
// convext.last_algorithm() and convext.last_reason().
#pragma once

#include "common/conv2d_problem.h"

namespace convext {

// Both must live as long as the process. From any thread.
void record_algorithm(Conv2dPass pass, const char* name, const char* reason);

// Null when the pass has not run yet.
const char* last_algorithm(Conv2dPass pass);
const char* last_reason(Conv2dPass pass);

}  // namespace convext
