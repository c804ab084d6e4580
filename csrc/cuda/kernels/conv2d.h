// Entry points of the CUDA convolutions and the table of their algorithms.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/arena.h"
#include "common/conv2d_problem.h"
#include "common/types.h"
#include "cuda/kernels/stream.h"

namespace convext::cuda {

// Done to every result of a forward pass before it is stored, in this order: a ReLU, then
// y = (y - shift) * scale + offset, then a ReLU. Arrays are (O), of the type of accumulation.
struct Conv2dEpilogue {
  bool relu_before;
  const void *shift, *scale, *offset;  // null, all three, for no map
  bool relu_after;
  // The mean of what came out and the sum of its squared deviations from that, of every channel.
  void *mean, *deviation;  // null, both, where nobody asks

  bool operator==(const Conv2dEpilogue&) const = default;
};

// One pass over tensors that all have the same dtype and layout. Sizes are the problem's; a tensor
// that the pass does not read is null. The output has elements; a tensor that is read may have none
// (sums over no input channels, or no images, are zeros).
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
  Conv2dEpilogue epilogue;  // forward
  bool tf32;                // may factors of float32 products be rounded to TF32?
  int compute_capability;   // of the device: 80 for 8.0
  Stream stream;
};

struct Conv2dAlgorithm {
  const char* name;
  // Null when it can do the call, else the reason it cannot.
  const char* (*declines)(const Conv2dCall&);
  // On a counting arena it only lays its workspace out, by the call without its pointers; otherwise
  // it also launches kernels, on the call's stream, which is all that it does: it neither allocates
  // nor waits, so that a graph can capture it. Work is cut by the problem alone, whatever the
  // device, and sums are taken in an order fixed by the cut: the same bits on every run.
  void (*run)(const Conv2dCall&, Arena&);
  // Whether run sums the epilogue's moments; where not, who wants them makes a pass of its own.
  bool sums_moments;
};

// Every algorithm, in the order in which documentation and tests walk them.
int conv2d_algorithm_count();
const Conv2dAlgorithm& conv2d_algorithm(int index);

// Null when no algorithm has this name.
const Conv2dAlgorithm* find_conv2d_algorithm(std::string_view name);

// conv2d_direct.cu
void conv2d_direct(const Conv2dCall&, Arena&);
// conv2d_depthwise.cu
const char* depthwise_declines(const Conv2dCall&);
void conv2d_depthwise(const Conv2dCall&, Arena&);

// conv2d_im2col.cu
const char* conv2d_im2col_declines(const Conv2dCall&);
void conv2d_im2col(const Conv2dCall&, Arena&);

// conv2d_implicit_gemm.cu
const char* conv2d_implicit_gemm_declines(const Conv2dCall&);
void conv2d_implicit_gemm(const Conv2dCall&, Arena&);

}  // namespace convext::cuda
