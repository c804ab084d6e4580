// The convolutions on any device: check, allocate, describe, call, return. Here and in its
// neighbours a Device is a struct of what differs from one to the other; csrc/cpu/glue.h and
// csrc/cuda/glue.h have one each.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>

#include "device_ops/operands.h"
#include "last_algorithm.h"
#include "tensor_args.h"

namespace convext {

template <class Device>
struct Conv2dOps {
  using Tensor = at::Tensor;
  using Call = typename Device::Conv2dCall;
  using Algorithm = typename Device::Conv2dAlgorithm;
  using Choice = typename Device::Conv2dChoice;

  // Fills in all but the problem, the pass and the operands.
  static void describe(Call& call, const Tensor& like, at::MemoryFormat format) {
    call.dtype = dtype_of(like);
    call.layout = layout_of(format);
    Device::describe(call);
  }

  // The algorithm asked for, noted for last_algorithm(), or an exception: a name is never exchanged
  // for another silently. "auto+winograd" is "auto" with Winograd's algorithms allowed: a value,
  // like any name, so that it reaches the backward pass and a compiled graph as the names do.
  // `call` is described, and has its operands, with which convext.autotune() measures.
  static const Algorithm& pick(const char* op, const Call& call, std::string_view name) {
    const auto [algorithm, why] = choose(op, call, name);
    TORCH_CHECK_VALUE(algorithm, op, "(): no algorithm \"", name, "\" on ", Device::kName,
                      "; expected \"auto\", \"auto+winograd\" or one of: ", algorithm_names());
    const char* reason = algorithm->declines(call);
    TORCH_CHECK_VALUE(!reason, op, "(): algorithm \"", name, "\" cannot do this problem: ", reason);
    record_algorithm(call.pass, algorithm->name, why);
    return *algorithm;
  }

  static Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       int64_t groups, std::string_view algorithm) {
    Call call{};
    call.problem = check_conv2d(input, weight, bias, {stride, padding, dilation, groups});
    call.pass = Conv2dPass::forward;
    const typename Device::Guard guard(input);
    const at::MemoryFormat format = common_memory_format({input, weight});
    const Tensor x = input.contiguous(format), w = weight.contiguous(format);
    const Tensor b = bias ? bias->contiguous() : Tensor();
    call.input = x.const_data_ptr();
    call.weight = w.const_data_ptr();
    call.bias = data_or_null(b);
    const Conv2dProblem& p = call.problem;
    return compute("conv2d", call, {p.batch, p.out_channels, p.out_height(), p.out_width()}, input,
                   format, algorithm);
  }

  static Tensor backward_input(const Tensor& grad_output, const Tensor& weight,
                               c10::SymIntArrayRef input_size, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                               std::string_view algorithm) {
    const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
    Call call{};
    call.problem =
        check_conv2d_backward_input(grad_output, weight, size, {stride, padding, dilation, groups});
    call.pass = Conv2dPass::backward_input;
    const typename Device::Guard guard(grad_output);
    const at::MemoryFormat format = common_memory_format({grad_output, weight});
    const Tensor g = grad_output.contiguous(format), w = weight.contiguous(format);
    call.grad_output = g.const_data_ptr();
    call.weight = w.const_data_ptr();
    return compute("conv2d_backward_input", call, size, grad_output, format, algorithm);
  }

  static Tensor backward_weight(const Tensor& grad_output, const Tensor& input,
                                c10::SymIntArrayRef weight_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                std::string_view algorithm) {
    const at::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(weight_size);
    Call call{};
    call.problem =
        check_conv2d_backward_weight(grad_output, input, size, {stride, padding, dilation, groups});
    call.pass = Conv2dPass::backward_weight;
    const typename Device::Guard guard(grad_output);
    const at::MemoryFormat format = common_memory_format({grad_output, input});
    const Tensor g = grad_output.contiguous(format), x = input.contiguous(format);
    call.grad_output = g.const_data_ptr();
    call.input = x.const_data_ptr();
    return compute("conv2d_backward_weight", call, size, grad_output, format, algorithm);
  }

  static void register_ops(torch::Library& m) {
    m.impl("conv2d", &conv2d);
    m.impl("conv2d_backward_input", &backward_input);
    m.impl("conv2d_backward_weight", &backward_weight);
  }

 private:
  static std::string algorithm_names() {
    std::string names;
    for (int i = 0; i < Device::conv2d_algorithm_count(); ++i) {
      names += std::string(i ? ", " : "") + Device::conv2d_algorithm(i).name;
    }
    return names;
  }

  // Null where no algorithm has the name.
  static Choice choose(const char* op, const Call& call, std::string_view name) {
    const bool winograd_allowed = name == "auto+winograd";
    if (name == "auto" || winograd_allowed) return Device::choose(op, call, winograd_allowed);
    return {Device::find_conv2d_algorithm(name), "asked for by name"};
  }

  // Allocates the result and computes it; `call` has the problem, the pass and its operands.
  static Tensor compute(const char* op, Call& call, at::IntArrayRef size, const Tensor& like,
                        at::MemoryFormat format, std::string_view name) {
    describe(call, like, format);
    const Algorithm& algorithm = pick(op, call, name);
    const Tensor result = Device::empty(size, like.scalar_type(), format);
    // Sizes that no memory backs may be huge, and their products wrap around.
    if (result.numel() == 0) return result;
    call.output = result.mutable_data_ptr();
    Device::run(op, call, algorithm.run);
    return result;
  }
};

}  // namespace convext
