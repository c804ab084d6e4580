#include "cuda/kernels/gemm_mma.h"

namespace convext::cuda {

template void multiply_mma<float>(const Gemm&, const Conv2dCall&);

}  // namespace convext::cuda
