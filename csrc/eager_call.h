// What Python calls in eager mode without the interpreter's way to an op, which takes longer than a
// small convolution: torch.ops looks every argument up for __torch_function__ and matches it
// against the schema. PyTorch's own functions have generated bindings for this; these are ours.
// They go through the dispatcher as the ops do. torch.compile cannot look into them: to be called
// only where torch.compiler.is_compiling() is false.
//
// All arguments come by place. What is not the plain call of plain tensors and numbers, or is to be
// refused before an op is called, they leave alone and return NotImplemented: that is for
// convext/functional.py.
#pragma once

#include <torch/csrc/python_headers.h>

namespace convext {

// conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm)
// batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
// conv_block(input, weight, bias, running_mean, running_var, norm_weight, norm_bias, stride,
//            padding, dilation, groups, training, momentum, eps, order, algorithm)
// count_batch(num_batches_tracked)
PyMethodDef* eager_calls();

}  // namespace convext
