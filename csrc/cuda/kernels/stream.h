// A CUDA stream, for those who pass it on and need no CUDA header.
#pragma once

struct CUstream_st;

namespace convext::cuda {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace convext::cuda
