// Entry points of the CPU convolutions and the table of their algorithms.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/arena.h"
#include "common/conv2d_problem.h"
#include "common/types.h"
#include "cpu/kernels/call_key.h"
#include "cpu/kernels/isa.h"

namespace convext::cpu {

// Done to every block of a forward pass's results while it is in cache, in this order.
struct Conv2dEpilogue {
  bool maps;                           // replace the results by a map of them:
  ColumnMapKind kind;                  // affine, relu_affine or affine_relu
  const void *shift, *scale, *offset;  // (O), of the accumulation type
  bool sums_moments;                   // of what came out:
  double *mean, *deviation;            // (O): mean, and sum of squared deviations from it
};

// One pass over tensors that all have the same dtype and layout. Sizes are the problem's; a tensor
// the pass does not read is null.
struct Conv2dCall {
  Conv2dProblem problem;
  Conv2dPass pass;
  DType dtype;
  Layout layout;
  const void* input;        // (N, C, H, W)                  forward, backward_weight
  const void* weight;       // (O, C / groups, kH, kW)       forward, backward_input
  const void* bias;         // (O), or null                  forward
  const void* grad_output;  // (N, O, out H, out W)          both backward passes
  void* output;             // what the pass computes
  const IsaKernels* isa;
  int64_t threads;                 // shares the work out; never changes a bit of the result
  const Conv2dEpilogue* epilogue;  // forward; null for none

  // All but where the operands are; see call_key.h.
  Conv2dCall description() const {
    Conv2dCall call = *this;
    call.input = presence(input);
    call.weight = presence(weight);
    call.bias = presence(bias);
    call.grad_output = presence(grad_output);
    call.output = presence(output);
    return call;
  }
  bool operator==(const Conv2dCall&) const = default;
  uint64_t hash() const {
    const Conv2dProblem& p = problem;
    return hash_of(p.batch, p.in_channels, p.in_height, p.in_width, p.out_channels, p.kernel_height,
                   p.kernel_width, p.stride_height, p.groups, pass, dtype, layout);
  }

  Weights weights() const {
    const Conv2dProblem& p = problem;
    return {weight, p.out_channels * p.group_in_channels() * p.kernel_taps() * size_of(dtype)};
  }
  void set_weights(const void* same) { weight = same; }
};

struct Conv2dAlgorithm {
  const char* name;
  // Null when it can do the call, else the reason it cannot.
  const char* (*declines)(const Conv2dCall&);
  // On a counting arena it only lays out its memory, by the call's description alone; otherwise it
  // also computes, and in the forward pass does what the call's epilogue asks for (see
  // BlockEpilogue).
  void (*run)(const Conv2dCall&, Arena&);
};

// Every algorithm, in the order in which documentation and tests walk them.
int conv2d_algorithm_count();
const Conv2dAlgorithm& conv2d_algorithm(int index);

// Null when no algorithm has this name.
const Conv2dAlgorithm* find_conv2d_algorithm(std::string_view name);

// conv2d_direct.cpp
void conv2d_direct(const Conv2dCall&, Arena&);
// conv2d_im2col.cpp
void conv2d_im2col(const Conv2dCall&, Arena&);
// conv2d_depthwise.cpp
void conv2d_depthwise(const Conv2dCall&, Arena&);
// conv2d_winograd.cpp: F(4x4, 3x3) and F(2x2, 3x3)
const char* winograd_declines(const Conv2dCall&);
void conv2d_winograd(const Conv2dCall&, Arena&);
void conv2d_winograd_2x2(const Conv2dCall&, Arena&);

}  // namespace convext::cpu
