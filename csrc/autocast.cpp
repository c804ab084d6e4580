// torch.autocast: the convolution runs in the lower precision, as PyTorch's does. Its gradients
// come in the dtypes that were cast from, since the casts are differentiated too. Batch norm, a
// block's too, is left as it comes: it takes 16-bit inputs beside float32 parameters, and sums in
// float32 anyway.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd/ops.h"

namespace convext {
namespace {

// A tensor, or an absent one, in the dtype of the device's autocast.
template <c10::DeviceType kDevice, class MaybeTensor>
MaybeTensor cast(const MaybeTensor& tensor) {
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  return at::autocast::cached_cast(dtype, tensor, kDevice);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       int64_t groups, std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below(kKey);
  return conv2d(cast<kDevice>(input), cast<kDevice>(weight), cast<kDevice>(bias), stride, padding,
                dilation, groups, algorithm);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_train_autocast(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
    const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps, std::string_view order,
    std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below(kKey);
  return conv_block_train(cast<kDevice>(input), cast<kDevice>(weight), cast<kDevice>(bias),
                          norm_weight, norm_bias, stride, padding, dilation, groups, eps, order,
                          algorithm);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
std::tuple<Tensor, Tensor> conv_block_eval_autocast(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& var, const optional<Tensor>& norm_weight, const optional<Tensor>& norm_bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, double eps,
    std::string_view order, bool keep_activation, std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below(kKey);
  return conv_block_eval(cast<kDevice>(input), cast<kDevice>(weight), cast<kDevice>(bias), mean,
                         var, norm_weight, norm_bias, stride, padding, dilation, groups, eps, order,
                         keep_activation, algorithm);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
void register_ops(torch::Library& m) {
  m.impl("conv2d", &conv2d_autocast<kDevice, kKey>);
  m.impl("conv_block_train", &conv_block_train_autocast<kDevice, kKey>);
  m.impl("conv_block_eval", &conv_block_eval_autocast<kDevice, kKey>);
}

}  // namespace

TORCH_LIBRARY_IMPL(convext, AutocastCPU, m) {
  register_ops<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}
TORCH_LIBRARY_IMPL(convext, AutocastCUDA, m) {
  register_ops<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}

}  // namespace convext
