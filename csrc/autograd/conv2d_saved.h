// What a convolution's autograd nodes keep besides tensors.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "autograd/ops.h"

namespace convext {

// The integers and the algorithm, which all three verbs share.
struct Conv2dSaved {
  // One entry for all integers, and none for the usual algorithm: the cost of a small convolution
  // is that of its bookkeeping.
  static void save(torch::autograd::AutogradContext* ctx, IntArrayRef stride, IntArrayRef padding,
                   IntArrayRef dilation, int64_t groups, std::string_view algorithm,
                   bool has_bias = false) {
    std::vector<int64_t> all;
    all.reserve(8);
    for (const IntArrayRef pair : {stride, padding, dilation}) {
      // What has another length is refused by the kernel, which runs before any backward.
      all.insert(all.end(), pair.begin(), pair.end());
    }
    all.push_back(groups);
    all.push_back(has_bias);
    ctx->saved_data["settings"] = std::move(all);
    if (algorithm != "auto") ctx->saved_data["algorithm"] = std::string(algorithm);
  }

  explicit Conv2dSaved(torch::autograd::AutogradContext* ctx)
      : all(ctx->saved_data["settings"].toIntVector()),
        stride(all.data(), 2),
        padding(all.data() + 2, 2),
        dilation(all.data() + 4, 2),
        groups(all[6]),
        has_bias(all[7]) {
    const auto named = ctx->saved_data.find("algorithm");
    if (named != ctx->saved_data.end()) algorithm = named->second.toStringRef();
  }
  Conv2dSaved(const Conv2dSaved&) = delete;  // the pairs point into `all`

  std::vector<int64_t> all;
  IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool has_bias;
  std::string algorithm = "auto";

  Tensor forward(const Tensor& input, const Tensor& weight) const {
    return conv2d(input, weight, std::nullopt, stride, padding, dilation, groups, algorithm);
  }
  Tensor backward_input(const Tensor& grad_output, const Tensor& weight,
                        SymIntArrayRef size) const {
    return conv2d_backward_input(grad_output, weight, size, stride, padding, dilation, groups,
                                 algorithm);
  }
  Tensor backward_weight(const Tensor& grad_output, const Tensor& input,
                         SymIntArrayRef size) const {
    return conv2d_backward_weight(grad_output, input, size, stride, padding, dilation, groups,
                                  algorithm);
  }
};

}  // namespace convext
