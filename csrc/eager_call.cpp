#include "eager_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "autograd/ops.h"

namespace convext {
namespace {

bool read_pair(PyObject* value, int64_t* pair) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  pair[0] = pair[1] = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

// conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm), or NotImplemented for
// what is not the plain call of plain tensors and ints: that is the op's.
PyObject* eager_conv2d(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  int64_t stride[2], padding[2], dilation[2], groups[2];
  const bool plain =
      count == 8 && THPVariable_CheckExact(arguments[0]) && THPVariable_CheckExact(arguments[1]) &&
      (arguments[2] == Py_None || THPVariable_CheckExact(arguments[2])) &&
      read_pair(arguments[3], stride) && read_pair(arguments[4], padding) &&
      read_pair(arguments[5], dilation) && read_pair(arguments[6], groups) &&
      PyUnicode_CheckExact(arguments[7]) && !at::impl::torch_function_mode_enabled() &&
      !at::tracer::impl::is_dispatch_enabled();
  if (!plain) Py_RETURN_NOTIMPLEMENTED;
  Py_ssize_t length = 0;
  const char* algorithm = PyUnicode_AsUTF8AndSize(arguments[7], &length);
  if (!algorithm) throw python_error();
  const Tensor& input = THPVariable_Unpack(arguments[0]);
  const Tensor& weight = THPVariable_Unpack(arguments[1]);
  std::optional<Tensor> bias;
  if (arguments[2] != Py_None) bias = THPVariable_Unpack(arguments[2]);
  Tensor output;
  {
    const pybind11::gil_scoped_release release;
    output = conv2d(input, weight, bias, stride, padding, dilation, groups[0],
                    std::string_view(algorithm, length));
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"conv2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&eager_conv2d)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMethodDef* eager_calls() {
  return methods;
}

}  // namespace convext
