// A forward pass's epilogue in a kernel: bias, ReLU, a map of each channel, ReLU.
#pragma once

#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/element.h"

namespace convext::cuda {

template <class T>
struct Epilogue {
  explicit Epilogue(const Conv2dCall& call)
      : bias(static_cast<const T*>(call.bias)),
        shift(static_cast<const Sum<T>*>(call.epilogue.shift)),
        scale(static_cast<const Sum<T>*>(call.epilogue.scale)),
        offset(static_cast<const Sum<T>*>(call.epilogue.offset)),
        relu_before(call.epilogue.relu_before),
        relu_after(call.epilogue.relu_after) {}

  // A NaN stays one, as in torch.relu.
  __device__ static Sum<T> relu(Sum<T> value) { return value < 0 ? Sum<T>(0) : value; }

  // From a sum of products to what is rounded and stored.
  __device__ Sum<T> operator()(Sum<T> value, int64_t channel) const {
    if (bias) value += widen(bias[channel]);
    if (relu_before) value = relu(value);
    if (scale) value = (value - shift[channel]) * scale[channel] + offset[channel];
    if (relu_after) value = relu(value);
    return value;
  }

  const T* bias;
  const Sum<T>*shift, *scale, *offset;
  bool relu_before, relu_after;
};

}  // namespace convext::cuda
