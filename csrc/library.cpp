// Every op's schema. Kernels register themselves: csrc/autograd for the Autograd key, csrc/cpu for
// the CPU, convext/fake.py for torch.compile and torch.export.
#include <torch/library.h>

TORCH_LIBRARY(convext, m) {
  const auto def = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };

  // The convolution and its derivatives. Bilinear, so that these are closed under differentiation.
  def("conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, str algorithm=\"auto\") -> Tensor");
  def("conv2d_backward_input(Tensor grad_output, Tensor weight, SymInt[] input_size, int[2] "
      "stride, "
      "int[2] padding, int[2] dilation, int groups, str algorithm=\"auto\") -> Tensor");
  def("conv2d_backward_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, str algorithm=\"auto\") -> "
      "Tensor");
  def("conv2d_backward_bias(Tensor grad_output) -> Tensor");

  // Batch norm. mean and var (biased) have the dtype in which sums are accumulated. They carry no
  // gradient: the derivatives with respect to input are complete without.
  def("batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor output, Tensor mean, Tensor var)");
  def("batch_norm_eval(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps) -> Tensor");
  def("batch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
      "Tensor? weight, float eps, bool training) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // running = (1 - momentum) * running + momentum * batch, in place, where there is one. The
  // variances' momentum also undoes the bias of the batch's.
  def("update_running_statistics(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor mean, "
      "Tensor var, Scalar momentum, Scalar var_momentum) -> ()");

  // Convolution, ReLU and batch norm as one, order being "conv-relu-norm" or "conv-norm-relu".
  // activation, the norm's input, is what the backward pass needs; eval gives an empty one where
  // it is not to be kept. conv_block_backward goes back to the convolution.
  def("conv_block_train(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, "
      "str order, str algorithm=\"auto\") "
      "-> (Tensor output, Tensor activation, Tensor mean, Tensor var)");
  def("conv_block_eval(Tensor input, Tensor weight, Tensor? bias, Tensor mean, Tensor var, "
      "Tensor? norm_weight, Tensor? norm_bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float eps, str order, bool keep_activation=False, str algorithm=\"auto\") "
      "-> (Tensor output, Tensor activation)");
  def("conv_block_backward(Tensor grad_output, Tensor activation, Tensor mean, Tensor var, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, bool training, str order) "
      "-> (Tensor grad_conv, Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)");
}
