// The convolutions on the CPU: check, allocate, describe, call, return.
#include "cpu/conv2d.h"

#include <ATen/Functions.h>

#include "common/parallel.h"
#include "cpu/autotune.h"
#include "cpu/glue.h"
#include "cpu/kernels/conv2d_choice.h"
#include "last_algorithm.h"
#include "tensor_args.h"

namespace convext::cpu {
namespace {

using at::Tensor;

std::string algorithm_names() {
  std::string names;
  for (int i = 0; i < conv2d_algorithm_count(); ++i) {
    names += std::string(i ? ", " : "") + conv2d_algorithm(i).name;
  }
  return names;
}

// Null where no algorithm has the name.
Conv2dChoice choose(const char* op, const Conv2dCall& call, std::string_view name) {
  const bool winograd_allowed = name == "auto+winograd";
  if (name != "auto" && !winograd_allowed) {
    return {find_conv2d_algorithm(name), "asked for by name"};
  }
  if (MeasuredTimes* times = autotuning()) {
    const Conv2dAlgorithm* fastest = times->fastest(op, call, winograd_allowed);
    if (fastest) return {fastest, "the fastest by the times of convext.autotune()"};
  }
  return choose_conv2d_algorithm(call, winograd_allowed);
}

}  // namespace

void describe_conv2d(Conv2dCall& call, const Tensor& like, at::MemoryFormat format) {
  call.dtype = dtype_of(like);
  call.layout = layout_of(format);
  call.isa = &kernels();
  call.threads = num_threads();
}

const Conv2dAlgorithm& pick_conv2d_algorithm(const char* op, const Conv2dCall& call,
                                             std::string_view name) {
  const auto [algorithm, why] = choose(op, call, name);
  TORCH_CHECK_VALUE(
      algorithm, op, "(): no algorithm \"", name,
      "\" on the CPU; expected \"auto\", \"auto+winograd\" or one of: ", algorithm_names());
  const char* reason = algorithm->declines(call);
  TORCH_CHECK_VALUE(!reason, op, "(): algorithm \"", name, "\" cannot do this problem: ", reason);
  record_algorithm(call.pass, algorithm->name, why);
  return *algorithm;
}

namespace {

// Allocates the result and computes it; `call` has the problem, the pass and its operands.
Tensor compute(const char* op, Conv2dCall call, at::IntArrayRef size, const Tensor& like,
               at::MemoryFormat format, std::string_view name) {
  describe_conv2d(call, like, format);
  const Conv2dAlgorithm& algorithm = pick_conv2d_algorithm(op, call, name);
  const Tensor result = empty_output(size, like, format);
  // Sizes that no memory backs may be huge, and their products wrap around.
  if (result.numel() == 0) return result;
  call.output = result.mutable_data_ptr();
  run_kernel(op, call, algorithm.run);
  return result;
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups, std::string_view algorithm) {
  Conv2dCall call{};
  call.problem = check_conv2d(input, weight, bias, {stride, padding, dilation, groups});
  call.pass = Conv2dPass::forward;
  const at::MemoryFormat format = common_memory_format({input, weight});
  const Tensor x = input.contiguous(format), w = weight.contiguous(format);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  call.input = x.const_data_ptr();
  call.weight = w.const_data_ptr();
  call.bias = bias ? b.const_data_ptr() : nullptr;
  const Conv2dProblem& p = call.problem;
  return compute("conv2d", call, {p.batch, p.out_channels, p.out_height(), p.out_width()}, input,
                 format, algorithm);
}

Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                             c10::SymIntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             std::string_view algorithm) {
  const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
  Conv2dCall call{};
  call.problem =
      check_conv2d_backward_input(grad_output, weight, size, {stride, padding, dilation, groups});
  call.pass = Conv2dPass::backward_input;
  const at::MemoryFormat format = common_memory_format({grad_output, weight});
  const Tensor g = grad_output.contiguous(format), w = weight.contiguous(format);
  call.grad_output = g.const_data_ptr();
  call.weight = w.const_data_ptr();
  return compute("conv2d_backward_input", call, size, grad_output, format, algorithm);
}

Tensor conv2d_backward_weight(const Tensor& grad_output, const Tensor& input,
                              c10::SymIntArrayRef weight_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              std::string_view algorithm) {
  const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(weight_size);
  Conv2dCall call{};
  call.problem =
      check_conv2d_backward_weight(grad_output, input, size, {stride, padding, dilation, groups});
  call.pass = Conv2dPass::backward_weight;
  const at::MemoryFormat format = common_memory_format({grad_output, input});
  const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
  call.grad_output = g.const_data_ptr();
  call.input = x.const_data_ptr();
  return compute("conv2d_backward_weight", call, size, grad_output, format, algorithm);
}

void register_ops(torch::Library& m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_backward_input", &conv2d_backward_input);
  m.impl("conv2d_backward_weight", &conv2d_backward_weight);
}

}  // namespace

CONVEXT_REGISTER_CPU(register_ops)

}  // namespace convext::cpu
