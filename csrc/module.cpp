// The Python module convext._C. Importing it runs the registrations of the ops; what it exports are
// facts about the build, the tables of algorithms and what the benchmarks measure the machine with,
// and nothing on the layers' path but eager_call.h, since a call of this module breaks a
// torch.compile graph.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "cpu/autotune.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv2d_choice.h"
#include "cpu/kernels/conv_block.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/peak.h"
#include "cpu/run_kernel.h"
#ifdef CONVEXT_CUDA_VERSION
#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/conv2d_choice.h"
#endif
#include "eager_call.h"
#include "last_algorithm.h"

namespace py = pybind11;

namespace convext {
namespace {

py::tuple names_of_isas(bool only_running_here) {
  py::list names;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    const cpu::IsaKernels& isa = cpu::isa_at(i);
    if (!only_running_here || isa.runs_here()) names.append(isa.name);
  }
  return py::tuple(names);
}

std::string joined(const py::tuple& names) {
  return py::str(", ").attr("join")(names).cast<std::string>();
}

template <class Algorithm>
py::tuple names_of_algorithms(int count, const Algorithm& (*algorithm)(int)) {
  py::list names;
  for (int i = 0; i < count; ++i) names.append(algorithm(i).name);
  return py::tuple(names);
}

py::object cpu_algorithms() {
  return names_of_algorithms(cpu::conv2d_algorithm_count(), &cpu::conv2d_algorithm);
}

// None where this build has none.
py::object cuda_algorithms() {
#ifdef CONVEXT_CUDA_VERSION
  return names_of_algorithms(cuda::conv2d_algorithm_count(), &cuda::conv2d_algorithm);
#else
  return py::none();
#endif
}

void set_cpu_isa(const std::string& name) {
  if (cpu::set_isa(name.c_str())) return;
  throw py::value_error("no CPU ISA \"" + name + "\" that this machine runs; expected one of: " +
                        joined(names_of_isas(true)));
}

// What is kept from call to call beside each thread's workspace: numbers of entries, and bytes.
py::dict cpu_memory() {
  py::dict memory;
  const auto add = [&](const char* name, const cpu::StoreSize& size) {
    memory[name] = py::make_tuple(size.values, size.bytes);
  };
  add("conv2d plans", cpu::plans<cpu::Conv2dCall>().size());
  add("batch norm plans", cpu::plans<cpu::BatchNormCall>().size());
  add("block plans", cpu::plans<cpu::ConvBlockCall>().size());
  add("packed weights", cpu::packed_weights_size());
  return memory;
}

py::dict build_info() {
  py::dict info;
  info["convext"] = CONVEXT_VERSION;
  info["torch"] = CONVEXT_TORCH_VERSION;
#ifdef CONVEXT_CUDA_VERSION
  info["cuda"] = CONVEXT_CUDA_VERSION;
  info["cuda_archs"] = CONVEXT_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["threads"] = "OpenMP";
#else
  info["threads"] = "none";
#endif
  info["cpu_isas"] = names_of_isas(false);
  info["cpu_isa"] = cpu::kernels().name;
  return info;
}

// What is known of the last call of each pass, None before one.
py::tuple of_each_pass(const char* (*known)(Conv2dPass)) {
  return py::make_tuple(known(Conv2dPass::forward), known(Conv2dPass::backward_input),
                        known(Conv2dPass::backward_weight));
}

template <class Row>
py::tuple rows_of_choice(int count, const Row& (*row)(int)) {
  py::list rows;
  for (int i = 0; i < count; ++i) rows.append(py::make_tuple(row(i).algorithm, row(i).reason));
  return py::tuple(rows);
}

py::object auto_rows() {
  return rows_of_choice(cpu::conv2d_choice_count(), &cpu::conv2d_choice);
}

py::object cuda_auto_rows() {
#ifdef CONVEXT_CUDA_VERSION
  return rows_of_choice(cuda::conv2d_choice_count(), &cuda::conv2d_choice);
#else
  return py::none();
#endif
}

int64_t fma_loop(bool double_precision, int64_t steps, int64_t tasks) {
  return cpu::fma_loop(double_precision ? DType::float64 : DType::float32, steps, tasks);
}

void copy_loop(const py::buffer& from, const py::buffer& to, int64_t repeats, int64_t tasks) {
  const py::buffer_info source = from.request(), target = to.request(/*writable=*/true);
  const py::ssize_t bytes = source.size * source.itemsize;
  if (source.ndim != 1 || target.ndim != 1 || source.strides[0] != source.itemsize ||
      target.strides[0] != target.itemsize || target.size * target.itemsize != bytes) {
    throw py::value_error("copy_loop: expected two contiguous buffers of the same size");
  }
  if (tasks < 1) throw py::value_error("copy_loop: expected at least one task");
  cpu::copy_loop(static_cast<const char*>(source.ptr), static_cast<char*>(target.ptr), bytes,
                 repeats, tasks);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* refused = cpu::refused_isa()) {
    throw py::import_error(
        "CONVEXT_CPU_ISA=" + std::string(refused) +
        " cannot be followed; this machine runs: " + joined(names_of_isas(true)));
  }
  if (PyModule_AddFunctions(m.ptr(), eager_calls()) != 0) throw py::error_already_set();
  m.def("build_info", &build_info);
  m.def("cpu_algorithms", &cpu_algorithms);
  m.def("cuda_algorithms", &cuda_algorithms);
  m.def("cpu_isas", [] { return names_of_isas(true); });
  m.def("cpu_isa", [] { return cpu::kernels().name; });
  m.def("set_cpu_isa", &set_cpu_isa);
  m.def("cpu_memory", &cpu_memory);
  m.def("last_algorithms", [] { return of_each_pass(&last_algorithm); });
  m.def("last_reasons", [] { return of_each_pass(&last_reason); });
  m.def("auto_rows", &auto_rows);
  m.def("cuda_auto_rows", &cuda_auto_rows);

  py::class_<cpu::MeasuredTimes, std::shared_ptr<cpu::MeasuredTimes>>(m, "MeasuredTimes")
      .def(py::init<>())
      .def("table", &cpu::MeasuredTimes::table)
      .def("add", &cpu::MeasuredTimes::add);
  m.def("exchange_autotuning", &cpu::exchange_autotuning, py::arg("times").none(true));
  m.def("fma_loop", &fma_loop, py::arg("double_precision"), py::arg("steps"), py::arg("tasks"));
  m.def("copy_loop", &copy_loop, py::arg("source"), py::arg("target"), py::arg("repeats"),
        py::arg("tasks"));
}

}  // namespace convext
