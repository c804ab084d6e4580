// Ops for Python in eager mode without the interpreter's way to an op, which takes longer than a
// small convolution: torch.ops looks every argument up for __torch_function__ and matches it
// against the schema. PyTorch's own functions have generated bindings for this; these are ours.
// They go through the dispatcher as the op does. torch.compile cannot look into them: to be called
// only where torch.compiler.is_compiling() is false.
#pragma once

#include <torch/csrc/python_headers.h>

namespace convext {

// conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm), all of them by place.
PyMethodDef* eager_calls();

}  // namespace convext
