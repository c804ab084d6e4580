// Moments or sums of a matrix's columns from those of its parts: what is left to do after kernels
// whose blocks each sum up a part. A convolution's epilogue that gathers moments ends with this.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace convext::cuda {

// `partial` is [part][mean, deviation][channel], where a part is part_rows of the rows, the last
// one what is left of them: the mean of a channel's values and the sum of their squared deviations
// from it. Gives both for all rows. S is float or double.
template <class S>
void merge_moments(const S* partial, int64_t part_rows, int64_t rows, int64_t channels, S* mean,
                   S* deviation, Stream stream);

// sum[channel] = the sum of partial[part][channel].
template <class S>
void add_parts(const S* partial, int64_t parts, int64_t channels, S* sum, Stream stream);

}  // namespace convext::cuda
