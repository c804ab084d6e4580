// torch.autocast: the convolution runs in the lower precision, as PyTorch's does. Its gradients
// come in the dtypes that were cast from, since the casts are differentiated too. Batch norm is
// left as it comes: it takes 16-bit inputs beside float32 parameters, and sums in float32 anyway.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd/find_op.h"

namespace convext {
namespace {

using at::Tensor;

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups, std::string_view algorithm) {
  static const auto op = find_op<decltype(conv2d)>("convext::conv2d");
  return op.call(input, weight, bias, stride, padding, dilation, groups, algorithm);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       int64_t groups, std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  return conv2d(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups,
                algorithm);
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, AutocastCPU, m) {
  m.impl("conv2d", &conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(convext, AutocastCUDA, m) {
  m.impl("conv2d", &conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace convext
