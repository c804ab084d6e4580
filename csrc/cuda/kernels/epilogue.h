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
  __device__ Sum<T> operator()(Sum<T> value, int64_t channel) const;

  const T* bias;
  const Sum<T>*shift, *scale, *offset;
  bool relu_before, relu_after;
};

// The same for one channel, of which many values come: its numbers are read once.
template <class T>
struct ChannelEpilogue {
  __device__ ChannelEpilogue(const Epilogue<T>& all, int64_t channel)
      : has_bias(all.bias),
        has_map(all.scale),
        relu_before(all.relu_before),
        relu_after(all.relu_after) {
    if (has_bias) bias = widen(all.bias[channel]);
    if (!has_map) return;
    shift = all.shift[channel];
    scale = all.scale[channel];
    offset = all.offset[channel];
  }

  __device__ Sum<T> operator()(Sum<T> value) const {
    if (has_bias) value += bias;
    if (relu_before) value = Epilogue<T>::relu(value);
    if (has_map) value = (value - shift) * scale + offset;
    if (relu_after) value = Epilogue<T>::relu(value);
    return value;
  }

  bool has_bias, has_map, relu_before, relu_after;
  Sum<T> bias = 0, shift = 0, scale = 0, offset = 0;
};

template <class T>
__device__ Sum<T> Epilogue<T>::operator()(Sum<T> value, int64_t channel) const {
  return ChannelEpilogue<T>(*this, channel)(value);
}

}  // namespace convext::cuda
