#include "eager_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <utility>

#include "autograd/ops.h"
#include "running_statistics.h"

namespace convext {
namespace {

bool nobody_intercepts() {
  return !at::impl::torch_function_mode_enabled() && !at::tracer::impl::is_dispatch_enabled();
}

// Reads a call's arguments by place, as long as they are plain: exactly torch.Tensor or Parameter,
// int, float, bool and str. After one that is not, what is read means nothing.
class Reader {
 public:
  Reader(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected)
      : next_(arguments), plain_(count == expected && nobody_intercepts()) {}

  bool plain() const { return plain_; }

  Tensor tensor() {
    PyObject* const value = take(&THPVariable_CheckExact);
    return value ? THPVariable_Unpack(value) : Tensor();
  }
  optional<Tensor> maybe_tensor() {
    if (plain_ && *next_ == Py_None) {
      ++next_;
      return std::nullopt;
    }
    return tensor();
  }
  int64_t integer() {
    PyObject* const value = take([](PyObject* v) { return PyLong_CheckExact(v); });
    return value ? to_integer(value) : 0;
  }
  // An int for both axes, or a tuple of two.
  std::array<int64_t, 2> pair() {
    if (!plain_ || !PyTuple_CheckExact(*next_)) {
      const int64_t both = integer();
      return {both, both};
    }
    PyObject* const values = *next_++;
    plain_ = PyTuple_GET_SIZE(values) == 2 && PyLong_CheckExact(PyTuple_GET_ITEM(values, 0)) &&
             PyLong_CheckExact(PyTuple_GET_ITEM(values, 1));
    if (!plain_) return {};
    return {to_integer(PyTuple_GET_ITEM(values, 0)), to_integer(PyTuple_GET_ITEM(values, 1))};
  }
  double number() {
    PyObject* const value = take([](PyObject* v) { return PyFloat_CheckExact(v); });
    return value ? PyFloat_AS_DOUBLE(value) : 0;
  }
  bool flag() {
    return take([](PyObject* v) { return PyBool_Check(v); }) == Py_True;
  }
  // Lives as long as the argument.
  std::string_view text() {
    PyObject* const value = take([](PyObject* v) { return PyUnicode_CheckExact(v); });
    if (!value) return {};
    Py_ssize_t length = 0;
    const char* const data = PyUnicode_AsUTF8AndSize(value, &length);
    if (!data) throw python_error();
    return {data, size_t(length)};
  }

 private:
  template <class IsPlain>
  PyObject* take(IsPlain is_plain) {
    plain_ = plain_ && is_plain(*next_);
    return plain_ ? *next_++ : nullptr;
  }
  int64_t to_integer(PyObject* value) {
    int overflow = 0;
    const int64_t result = PyLong_AsLongLongAndOverflow(value, &overflow);
    plain_ = plain_ && overflow == 0;
    return result;
  }

  PyObject* const* next_;
  bool plain_;
};

PyObject* conv2d_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Reader read(arguments, count, 8);
  const Tensor input = read.tensor(), weight = read.tensor();
  const optional<Tensor> bias = read.maybe_tensor();
  const auto stride = read.pair(), padding = read.pair(), dilation = read.pair();
  const int64_t groups = read.integer();
  const std::string_view algorithm = read.text();
  if (!read.plain() || input.dim() != 4) Py_RETURN_NOTIMPLEMENTED;
  Tensor output;
  {
    const pybind11::gil_scoped_release release;
    output = conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// Batch norm's arguments that it updates in training and reads otherwise.
struct Running {
  optional<Tensor> mean, var;

  // Whether convext/functional.py has nothing to say against them. Else it is to say it.
  bool are_usual(int64_t channels, bool training) const {
    const auto is_usual = [&](const optional<Tensor>& running) {
      if (!running) return training;
      return !running->requires_grad() && running->dim() == 1 && running->size(0) == channels;
    };
    return is_usual(mean) && is_usual(var);
  }

  // Takes in a batch by its mean and its biased variance; the unbiased one goes in.
  void update(const Tensor& batch_mean, const Tensor& batch_var, const Tensor& normalized,
              double momentum) const {
    if (!mean && !var) return;
    const double values = double(normalized.numel() / normalized.size(1));
    update_running_statistics(mean, var, batch_mean, batch_var, momentum,
                              momentum * values / (values - 1));
  }
};

PyObject* batch_norm_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Reader read(arguments, count, 8);
  const Tensor input = read.tensor();
  Running running;
  running.mean = read.maybe_tensor();
  running.var = read.maybe_tensor();
  const optional<Tensor> weight = read.maybe_tensor(), bias = read.maybe_tensor();
  const bool training = read.flag();
  const double momentum = read.number(), eps = read.number();
  if (!read.plain() || input.is_nested() || input.dim() < 2 || input.numel() == 0 ||
      !running.are_usual(input.size(1), training)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor output;
  {
    const pybind11::gil_scoped_release release;
    if (training) {
      Tensor mean, var;
      std::tie(output, mean, var) = batch_norm_train(input, weight, bias, eps);
      running.update(mean, var, output, momentum);
    } else {
      output = batch_norm_eval(input, *running.mean, *running.var, weight, bias, eps);
    }
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyObject* conv_block_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Reader read(arguments, count, 16);
  const Tensor input = read.tensor(), weight = read.tensor();
  const optional<Tensor> bias = read.maybe_tensor();
  Running running;
  running.mean = read.maybe_tensor();
  running.var = read.maybe_tensor();
  const optional<Tensor> norm_weight = read.maybe_tensor(), norm_bias = read.maybe_tensor();
  const auto stride = read.pair(), padding = read.pair(), dilation = read.pair();
  const int64_t groups = read.integer();
  const bool training = read.flag();
  const double momentum = read.number(), eps = read.number();
  const std::string_view order = read.text(), algorithm = read.text();
  if (!read.plain() || input.dim() != 4 || input.numel() == 0 || weight.dim() != 4 ||
      !running.are_usual(weight.size(0), training)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor output;
  {
    const pybind11::gil_scoped_release release;
    if (training) {
      Tensor activation, mean, var;
      std::tie(output, activation, mean, var) =
          conv_block_train(input, weight, bias, norm_weight, norm_bias, stride, padding, dilation,
                           groups, eps, order, algorithm);
      running.update(mean, var, output, momentum);
    } else {
      output = std::get<0>(conv_block_eval(
          input, weight, bias, *running.mean, *running.var, norm_weight, norm_bias, stride, padding,
          dilation, groups, eps, order, /*keep_activation=*/false, algorithm));
    }
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyObject* count_batch_call(PyObject*, PyObject* batches) {
  HANDLE_TH_ERRORS
  if (!THPVariable_CheckExact(batches) || !nobody_intercepts() ||
      !count_batch(THPVariable_Unpack(batches))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyCFunction by_place(PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
}

PyMethodDef methods[] = {
    {"conv2d", by_place(&conv2d_call), METH_FASTCALL, nullptr},
    {"batch_norm", by_place(&batch_norm_call), METH_FASTCALL, nullptr},
    {"conv_block", by_place(&conv_block_call), METH_FASTCALL, nullptr},
    {"count_batch", &count_batch_call, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMethodDef* eager_calls() {
  return methods;
}

}  // namespace convext
