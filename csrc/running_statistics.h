// What batch norm keeps of the batches it has seen, updated in place: a few numbers, for which
// torch's own operations would take longer than a small batch norm does. The op
// update_running_statistics is registered here, too.
#pragma once

#include <ATen/core/Tensor.h>

namespace convext {

// batches += 1, or false and nothing done where that is for torch's add_: a tensor of an unusual
// kind, or one that somebody watches.
bool count_batch(const at::Tensor& batches);

}  // namespace convext
