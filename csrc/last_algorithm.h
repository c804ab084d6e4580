// Which algorithm computed each pass of the last convolutions, for convext.last_algorithm().
#pragma once

#include "common/conv2d_problem.h"

namespace convext {

// `name` must live as long as the process. From any thread.
void record_algorithm(Conv2dPass pass, const char* name);

// Null when the pass has not run yet.
const char* last_algorithm(Conv2dPass pass);

}  // namespace convext
