// The convolutions on the CPU: check, allocate, describe, call, return.
#include <ATen/Functions.h>

#include "common/parallel.h"
#include "cpu/glue.h"
#include "cpu/kernels/conv2d.h"
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

// The algorithm asked for, or an exception: a name is never exchanged for another silently.
const Conv2dAlgorithm& pick(const char* op, const Conv2dCall& call, std::string_view name) {
  if (name == "auto") return choose_conv2d_algorithm(call);
  const Conv2dAlgorithm* algorithm = find_conv2d_algorithm(name);
  TORCH_CHECK_VALUE(algorithm, op, "(): no algorithm \"", name,
                    "\" on the CPU; expected \"auto\" or one of: ", algorithm_names());
  const char* reason = algorithm->declines(call);
  TORCH_CHECK_VALUE(!reason, op, "(): algorithm \"", name, "\" cannot do this problem: ", reason);
  return *algorithm;
}

void run(const char* op, Conv2dCall& call, const Tensor& result, std::string_view name) {
  call.isa = &kernels();
  call.threads = num_threads();
  const Conv2dAlgorithm& algorithm = pick(op, call, name);
  record_algorithm(call.pass, algorithm.name);
  // Sizes that no memory backs may be huge, and their products wrap around.
  if (result.numel() == 0) return;
  run_with_workspace(op, [&](Arena& arena) { algorithm.run(call, arena); });
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups, std::string_view algorithm) {
  const Conv2dProblem problem =
      check_conv2d(input, weight, bias, {stride, padding, dilation, groups});
  const at::MemoryFormat format = common_memory_format({input, weight});
  const Tensor x = input.contiguous(format), w = weight.contiguous(format);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const Tensor output =
      at::empty({problem.batch, problem.out_channels, problem.out_height(), problem.out_width()},
                input.options().memory_format(format));
  Conv2dCall call{problem,
                  Conv2dPass::forward,
                  dtype_of(input),
                  layout_of(format),
                  x.const_data_ptr(),
                  w.const_data_ptr(),
                  bias ? b.const_data_ptr() : nullptr,
                  nullptr,
                  output.mutable_data_ptr(),
                  nullptr,
                  1};
  run("conv2d", call, output, algorithm);
  return output;
}

Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                             c10::SymIntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             std::string_view algorithm) {
  const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
  const Conv2dProblem problem =
      check_conv2d_backward_input(grad_output, weight, size, {stride, padding, dilation, groups});
  const at::MemoryFormat format = common_memory_format({grad_output, weight});
  const Tensor g = grad_output.contiguous(format), w = weight.contiguous(format);
  const Tensor grad_input = at::empty(size, grad_output.options().memory_format(format));
  Conv2dCall call{problem,
                  Conv2dPass::backward_input,
                  dtype_of(grad_output),
                  layout_of(format),
                  nullptr,
                  w.const_data_ptr(),
                  nullptr,
                  g.const_data_ptr(),
                  grad_input.mutable_data_ptr(),
                  nullptr,
                  1};
  run("conv2d_backward_input", call, grad_input, algorithm);
  return grad_input;
}

Tensor conv2d_backward_weight(const Tensor& grad_output, const Tensor& input,
                              c10::SymIntArrayRef weight_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              std::string_view algorithm) {
  const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(weight_size);
  const Conv2dProblem problem =
      check_conv2d_backward_weight(grad_output, input, size, {stride, padding, dilation, groups});
  const at::MemoryFormat format = common_memory_format({grad_output, input});
  const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
  const Tensor grad_weight = at::empty(size, grad_output.options().memory_format(format));
  Conv2dCall call{problem,
                  Conv2dPass::backward_weight,
                  dtype_of(grad_output),
                  layout_of(format),
                  x.const_data_ptr(),
                  nullptr,
                  nullptr,
                  g.const_data_ptr(),
                  grad_weight.mutable_data_ptr(),
                  nullptr,
                  1};
  run("conv2d_backward_weight", call, grad_weight, algorithm);
  return grad_weight;
}

void register_ops(torch::Library& m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_backward_input", &conv2d_backward_input);
  m.impl("conv2d_backward_weight", &conv2d_backward_weight);
}

}  // namespace

CONVEXT_REGISTER_CPU(register_ops)

}  // namespace convext::cpu
