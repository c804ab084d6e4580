// From tensors and integers that anybody may pass to torch.ops.convext.* to a checked problem. The
// only such place: past it, kernels trust what they are given.
//
// Every check raises what PyTorch's own layer raises in kind, naming the argument, the value and
// what was expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/batch_norm_problem.h"
#include "common/conv2d_problem.h"
#include "common/conv_block_problem.h"
#include "common/types.h"

namespace convext {

// Arguments of a convolution besides its tensors, as they came.
struct Conv2dSettings {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// A dense, strided tensor of a dtype that the kernels know, with the storage its sizes need.
void check_tensor(const char* op, const char* name, const at::Tensor& tensor);
// What can be said before autograd looks at a tensor, sizes being symbolic perhaps: that it is
// there, dense and of a dtype that the kernels know.
void check_kind(const char* op, const char* name, const at::Tensor& tensor);
// The same, and of the dtype and on the device of `like`.
void check_tensor_like(const char* op, const char* name, const at::Tensor& tensor,
                       const char* like_name, const at::Tensor& like);
void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                  const at::Tensor& like);

DType dtype_of(const at::Tensor& checked);

// channels_last when any of the tensors is, as PyTorch's convolutions decide.
at::MemoryFormat common_memory_format(at::ArrayRef<at::Tensor> tensors);
Layout layout_of(at::MemoryFormat format);

Conv2dProblem check_conv2d(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const Conv2dSettings& settings);
Conv2dProblem check_conv2d_backward_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                          at::IntArrayRef input_size,
                                          const Conv2dSettings& settings);
Conv2dProblem check_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                           at::IntArrayRef weight_size,
                                           const Conv2dSettings& settings);
void check_conv2d_backward_bias(const at::Tensor& grad_output);

BatchNormProblem check_batch_norm_train(const at::Tensor& input,
                                        const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias, double eps);
BatchNormProblem check_batch_norm_eval(const at::Tensor& input, const at::Tensor& mean,
                                       const at::Tensor& var,
                                       const std::optional<at::Tensor>& weight,
                                       const std::optional<at::Tensor>& bias, double eps);
BatchNormProblem check_batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& mean, const at::Tensor& var,
                                           const std::optional<at::Tensor>& weight, double eps,
                                           bool training);

// `order` is "conv-relu-norm" or "conv-norm-relu".
ConvBlockProblem check_conv_block_train(const at::Tensor& input, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias,
                                        const std::optional<at::Tensor>& norm_weight,
                                        const std::optional<at::Tensor>& norm_bias,
                                        const Conv2dSettings& settings, double eps,
                                        std::string_view order);
ConvBlockProblem check_conv_block_eval(const at::Tensor& input, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias,
                                       const at::Tensor& mean, const at::Tensor& var,
                                       const std::optional<at::Tensor>& norm_weight,
                                       const std::optional<at::Tensor>& norm_bias,
                                       const Conv2dSettings& settings, double eps,
                                       std::string_view order);
BatchNormProblem check_conv_block_backward(const at::Tensor& grad_output,
                                           const at::Tensor& activation, const at::Tensor& mean,
                                           const at::Tensor& var,
                                           const std::optional<at::Tensor>& norm_weight,
                                           const std::optional<at::Tensor>& norm_bias, double eps,
                                           bool training, std::string_view order, Relu* relu);

}  // namespace convext
