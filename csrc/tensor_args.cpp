#include "tensor_args.h"

#include <c10/util/Exception.h>

namespace convext {
namespace {

// Sums and products of sizes that are not backed by memory must not wrap around.
int64_t checked_mul(const char* op, const char* what, int64_t a, int64_t b) {
  int64_t result = 0;
  TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), op, "(): ", what,
              " does not fit into 64 bits: ", a, " * ", b);
  return result;
}

int64_t checked_add(const char* op, const char* what, int64_t a, int64_t b) {
  int64_t result = 0;
  TORCH_CHECK(!__builtin_add_overflow(a, b, &result), op, "(): ", what,
              " does not fit into 64 bits: ", a, " + ", b);
  return result;
}

// A tensor's storage can be shrunk under it (untyped_storage().resize_()).
void check_storage(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last = checked_add(
        op, "the extent of a tensor", last,
        checked_mul(op, "the extent of a tensor", tensor.size(d) - 1, tensor.stride(d)));
  }
  const int64_t needed = checked_mul(op, "the extent of a tensor", last + 1, tensor.itemsize());
  const int64_t held = int64_t(tensor.storage().nbytes());
  TORCH_CHECK(held >= needed && tensor.const_data_ptr() != nullptr, op, "(): ", name, " of size ",
              tensor.sizes(), " needs ", needed, " bytes of storage, but its storage holds ", held);
}

void check_pair(const char* op, const char* name, at::IntArrayRef values, int64_t least,
                const char* expected) {
  TORCH_CHECK(values.size() == 2, op, "(): ", name, " must have 2 elements (height, width), got ",
              values);
  TORCH_CHECK(values[0] >= least && values[1] >= least, op, "(): ", expected, ": ", name, " is ",
              values);
}

// One spatial axis: whether the kernel fits, and that no later arithmetic can overflow.
void check_axis(const char* op, const char* axis, int64_t input, int64_t kernel, int64_t padding,
                int64_t dilation) {
  const int64_t padded = checked_add(op, "the padded input size", input,
                                     checked_mul(op, "the padded input size", padding, 2));
  const int64_t reach =
      checked_add(op, "the dilated kernel size",
                  checked_mul(op, "the dilated kernel size", dilation, kernel - 1), 1);
  TORCH_CHECK(padded < (int64_t(1) << 61), op, "(): padded input ", axis, " ", padded,
              " is too large");
  TORCH_CHECK(reach <= padded, op,
              "(): Kernel size can't be greater than actual input size: padded ", axis,
              " of the input is ", padded, ", of the dilated kernel ", reach, " (kernel ", kernel,
              ", dilation ", dilation, ", padding ", padding, ")");
}

Conv2dProblem make_problem(const char* op, at::IntArrayRef input, at::IntArrayRef weight,
                           const Conv2dSettings& settings) {
  TORCH_CHECK(input.size() == 4, op, "(): Expected 4D (batched) input of size (N, C, H, W), got ",
              input);
  TORCH_CHECK(weight.size() == 4, op,
              "(): Expected 4D weight of size (out_channels, in_channels / groups, kH, kW), got ",
              weight);
  check_pair(op, "stride", settings.stride, 1, "non-positive stride is not supported");
  check_pair(op, "padding", settings.padding, 0, "negative padding is not supported");
  check_pair(op, "dilation", settings.dilation, 1, "dilation must be positive");
  const int64_t groups = settings.groups;
  TORCH_CHECK(groups > 0, op, "(): non-positive groups is not supported: groups is ", groups);
  for (const int64_t size : input) {
    TORCH_CHECK(size >= 0, op, "(): input size must not be negative, got ", input);
  }
  for (const int64_t size : weight) {
    TORCH_CHECK(size >= 0, op, "(): weight size must not be negative, got ", weight);
  }
  TORCH_CHECK(weight[2] > 0 && weight[3] > 0, op,
              "(): kernel size must be positive, got weight of size ", weight);
  TORCH_CHECK(weight[0] > 0, op, "(): weight must have at least one output channel, got size ",
              weight);
  TORCH_CHECK(weight[0] % groups == 0, op, "(): Given groups=", groups,
              ", expected weight to have output channels divisible by it, but got weight of size ",
              weight);
  TORCH_CHECK(checked_mul(op, "the number of input channels", weight[1], groups) == input[1], op,
              "(): Given groups=", groups, ", weight of size ", weight, ", expected input ", input,
              " to have ", weight[1] * groups, " channels, but got ", input[1],
              " channels instead");
  TORCH_CHECK(input[2] > 0 && input[3] > 0, op,
              "(): Only zero batch or zero channel inputs are supported, but got input of size ",
              input);
  check_axis(op, "height", input[2], weight[2], settings.padding[0], settings.dilation[0]);
  check_axis(op, "width", input[3], weight[3], settings.padding[1], settings.dilation[1]);
  return {input[0],
          input[1],
          input[2],
          input[3],
          weight[0],
          weight[2],
          weight[3],
          settings.stride[0],
          settings.stride[1],
          settings.padding[0],
          settings.padding[1],
          settings.dilation[0],
          settings.dilation[1],
          groups};
}

void check_grad_output(const char* op, const at::Tensor& grad_output, const Conv2dProblem& p) {
  const int64_t expected[] = {p.batch, p.out_channels, p.out_height(), p.out_width()};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(expected), op,
              "(): expected grad_output of size ", at::IntArrayRef(expected), ", got ",
              grad_output.sizes());
}

// A value for each channel: of input's dtype, or float32 beside a 16-bit input.
void check_channel_values(const char* op, const char* name, const at::Tensor& values,
                          const at::Tensor& input, int64_t channels) {
  check_tensor(op, name, values);
  check_device(op, name, values, "input", input);
  const at::ScalarType type = values.scalar_type(), input_type = input.scalar_type();
  const bool half = input_type == at::kBFloat16 || input_type == at::kHalf;
  TORCH_CHECK(type == input_type || (half && type == at::kFloat), op, "(): ", name, " type (", type,
              ") should be the input type (", input_type, ")",
              half ? " or that of its sums (Float)" : "");
  TORCH_CHECK(values.numel() == channels, op, "(): ", name, " should contain ", channels,
              " elements not ", values.numel());
  TORCH_CHECK(values.dim() == 1, op, "(): ", name, " should have size [", channels, "], got ",
              values.sizes());
}

void check_channel_pair(const char* op, const char* name, const at::Tensor& values,
                        const char* like_name, const at::Tensor& like) {
  TORCH_CHECK(values.scalar_type() == like.scalar_type(), op, "(): ", like_name, " type (",
              like.scalar_type(), ") and ", name, " type (", values.scalar_type(),
              ") should be the same");
}

// What a batch norm has for each channel, whichever an op has, under the names that it has there.
struct NormArguments {
  const at::Tensor *mean, *var;
  const std::optional<at::Tensor>&weight, &bias;
  double eps;
  bool training;
  const char* weight_name = "weight";
  const char* bias_name = "bias";
};

void check_norm_arguments(const char* op, const NormArguments& norm, const at::Tensor& input,
                          int64_t channels) {
  if (norm.mean) {
    check_channel_values(op, "mean", *norm.mean, input, channels);
    check_channel_values(op, "var", *norm.var, input, channels);
    check_channel_pair(op, "var", *norm.var, "mean", *norm.mean);
  }
  if (norm.weight) check_channel_values(op, norm.weight_name, *norm.weight, input, channels);
  if (norm.bias) check_channel_values(op, norm.bias_name, *norm.bias, input, channels);
  if (norm.weight && norm.bias) {
    check_channel_pair(op, norm.bias_name, *norm.bias, norm.weight_name, *norm.weight);
  }
  TORCH_CHECK_VALUE(norm.training ? norm.eps > 0 : norm.eps >= 0, op, "(): eps must be ",
                    norm.training ? "positive during training" : "non-negative", ", but got ",
                    norm.eps);
}

BatchNormProblem check_batch_norm(const char* op, const at::Tensor& input,
                                  const NormArguments& norm) {
  check_tensor(op, "input", input);
  TORCH_CHECK(input.dim() >= 2, op, "(): expected input of size (N, C, *), got ", input.sizes());
  check_norm_arguments(op, norm, input, input.size(1));
  BatchNormProblem problem{input.size(0), input.size(1), 1};
  for (int64_t d = 2; d < input.dim(); ++d) {
    problem.pixels = checked_mul(op, "the number of pixels", problem.pixels, input.size(d));
  }
  // Sizes beside a zero are backed by no memory.
  checked_mul(op, "the number of elements",
              checked_mul(op, "the number of elements", problem.batch, problem.pixels),
              problem.channels);
  return problem;
}

// A variance takes two values.
void check_value_count(const char* op, const BatchNormProblem& problem, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(problem.count() != 1, op,
                    "(): Expected more than 1 value per channel when training, got input size ",
                    size);
}

void check_conv2d_bias(const char* op, const std::optional<at::Tensor>& bias,
                       const at::Tensor& input, const at::Tensor& weight) {
  if (!bias) return;
  check_tensor_like(op, "bias", *bias, "input", input);
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, "(): Given weight of size ",
              weight.sizes(), ", expected bias to be 1-dimensional with ", weight.size(0),
              " elements, but got bias of size ", bias->sizes(), " instead");
}

Conv2dProblem check_forward(const char* op, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Conv2dSettings& settings) {
  check_tensor(op, "input", input);
  check_tensor_like(op, "weight", weight, "input", input);
  const Conv2dProblem problem = make_problem(op, input.sizes(), weight.sizes(), settings);
  check_conv2d_bias(op, bias, input, weight);
  return problem;
}

Relu check_order(const char* op, std::string_view order) {
  if (order == "conv-relu-norm") return Relu::before_norm;
  TORCH_CHECK_VALUE(order == "conv-norm-relu", op,
                    "(): order must be \"conv-relu-norm\" or \"conv-norm-relu\", got \"", order,
                    "\"");
  return Relu::after_norm;
}

ConvBlockProblem check_conv_block(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const Conv2dSettings& settings, const NormArguments& norm,
                                  std::string_view order) {
  const Relu relu = check_order(op, order);
  const ConvBlockProblem problem{check_forward(op, input, weight, bias, settings), relu};
  check_norm_arguments(op, norm, input, problem.conv.out_channels);
  const Conv2dProblem& p = problem.conv;
  if (norm.training) {
    check_value_count(op, problem.norm(), {p.batch, p.out_channels, p.out_height(), p.out_width()});
  }
  return problem;
}

}  // namespace

void check_kind(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, "(): ", name, " must be a tensor, got none");
  TORCH_CHECK(!tensor.is_nested(), op, "(): ", name, " must be a dense tensor, got a nested one");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, "(): ", name,
              " must be a dense (strided) tensor, got layout ", tensor.layout());
  TORCH_CHECK(!tensor.is_quantized(), op, "(): ", name, " must not be quantized, got dtype ",
              tensor.scalar_type());
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      break;
    default:
      TORCH_CHECK(false, op, "(): ", name,
                  " must have dtype float32, float64, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

void check_tensor(const char* op, const char* name, const at::Tensor& tensor) {
  check_kind(op, name, tensor);
  if (tensor.has_storage() && !tensor.is_meta()) check_storage(op, name, tensor);
}

void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                  const at::Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), op, "(): expected ", name, " on the device of ",
              like_name, ", ", like.device(), ", got ", tensor.device());
}

void check_tensor_like(const char* op, const char* name, const at::Tensor& tensor,
                       const char* like_name, const at::Tensor& like) {
  check_tensor(op, name, tensor);
  check_device(op, name, tensor, like_name, like);
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, "(): ", like_name, " type (",
              like.scalar_type(), ") and ", name, " type (", tensor.scalar_type(),
              ") should be the same");
}

DType dtype_of(const at::Tensor& checked) {
  switch (checked.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return DType::float32;
  }
}

at::MemoryFormat common_memory_format(at::ArrayRef<at::Tensor> tensors) {
  for (const at::Tensor& tensor : tensors) {
    const at::MemoryFormat format = tensor.suggest_memory_format();
    if (format != at::MemoryFormat::Contiguous) return format;
  }
  return at::MemoryFormat::Contiguous;
}

Layout layout_of(at::MemoryFormat format) {
  return format == at::MemoryFormat::Contiguous ? Layout::nchw : Layout::nhwc;
}

Conv2dProblem check_conv2d(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const Conv2dSettings& settings) {
  return check_forward("conv2d", input, weight, bias, settings);
}

Conv2dProblem check_conv2d_backward_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                          at::IntArrayRef input_size,
                                          const Conv2dSettings& settings) {
  const char* op = "conv2d_backward_input";
  check_tensor(op, "grad_output", grad_output);
  check_tensor_like(op, "weight", weight, "grad_output", grad_output);
  const Conv2dProblem problem = make_problem(op, input_size, weight.sizes(), settings);
  check_grad_output(op, grad_output, problem);
  return problem;
}

Conv2dProblem check_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                           at::IntArrayRef weight_size,
                                           const Conv2dSettings& settings) {
  const char* op = "conv2d_backward_weight";
  check_tensor(op, "grad_output", grad_output);
  check_tensor_like(op, "input", input, "grad_output", grad_output);
  const Conv2dProblem problem = make_problem(op, input.sizes(), weight_size, settings);
  check_grad_output(op, grad_output, problem);
  return problem;
}

void check_conv2d_backward_bias(const at::Tensor& grad_output) {
  const char* op = "conv2d_backward_bias";
  check_tensor(op, "grad_output", grad_output);
  TORCH_CHECK(grad_output.dim() == 4, op, "(): Expected 4D grad_output of size (N, C, H, W), got ",
              grad_output.sizes());
}

BatchNormProblem check_batch_norm_train(const at::Tensor& input,
                                        const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias, double eps) {
  const char* op = "batch_norm_train";
  const BatchNormProblem problem =
      check_batch_norm(op, input, {nullptr, nullptr, weight, bias, eps, true});
  check_value_count(op, problem, input.sizes());
  return problem;
}

BatchNormProblem check_batch_norm_eval(const at::Tensor& input, const at::Tensor& mean,
                                       const at::Tensor& var,
                                       const std::optional<at::Tensor>& weight,
                                       const std::optional<at::Tensor>& bias, double eps) {
  return check_batch_norm("batch_norm_eval", input, {&mean, &var, weight, bias, eps, false});
}

BatchNormProblem check_batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& mean, const at::Tensor& var,
                                           const std::optional<at::Tensor>& weight, double eps,
                                           bool training) {
  const char* op = "batch_norm_backward";
  const BatchNormProblem problem =
      check_batch_norm(op, input, {&mean, &var, weight, std::nullopt, eps, training});
  check_tensor_like(op, "grad_output", grad_output, "input", input);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), op, "(): expected grad_output of input's size ",
              input.sizes(), ", got ", grad_output.sizes());
  return problem;
}

ConvBlockProblem check_conv_block_train(const at::Tensor& input, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias,
                                        const std::optional<at::Tensor>& norm_weight,
                                        const std::optional<at::Tensor>& norm_bias,
                                        const Conv2dSettings& settings, double eps,
                                        std::string_view order) {
  return check_conv_block(
      "conv_block_train", input, weight, bias, settings,
      {nullptr, nullptr, norm_weight, norm_bias, eps, true, "norm_weight", "norm_bias"}, order);
}

ConvBlockProblem check_conv_block_eval(const at::Tensor& input, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias,
                                       const at::Tensor& mean, const at::Tensor& var,
                                       const std::optional<at::Tensor>& norm_weight,
                                       const std::optional<at::Tensor>& norm_bias,
                                       const Conv2dSettings& settings, double eps,
                                       std::string_view order) {
  return check_conv_block(
      "conv_block_eval", input, weight, bias, settings,
      {&mean, &var, norm_weight, norm_bias, eps, false, "norm_weight", "norm_bias"}, order);
}

BatchNormProblem check_conv_block_backward(const at::Tensor& grad_output,
                                           const at::Tensor& activation, const at::Tensor& mean,
                                           const at::Tensor& var,
                                           const std::optional<at::Tensor>& norm_weight,
                                           const std::optional<at::Tensor>& norm_bias, double eps,
                                           bool training, std::string_view order, Relu* relu) {
  const char* op = "conv_block_backward";
  *relu = check_order(op, order);
  check_tensor(op, "activation", activation);
  TORCH_CHECK(activation.dim() == 4, op, "(): Expected 4D activation of size (N, C, H, W), got ",
              activation.sizes());
  const BatchNormProblem problem = check_batch_norm(
      op, activation,
      {&mean, &var, norm_weight, norm_bias, eps, training, "norm_weight", "norm_bias"});
  check_tensor_like(op, "grad_output", grad_output, "activation", activation);
  TORCH_CHECK(grad_output.sizes() == activation.sizes(), op,
              "(): expected grad_output of activation's size ", activation.sizes(), ", got ",
              grad_output.sizes());
  return problem;
}

}  // namespace convext
