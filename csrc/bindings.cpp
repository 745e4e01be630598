// SPDX-License-Identifier: GPL-3.0-or-later
// The index of the extension: one m.def per entry and no logic.  Tensors arrive as addresses; ops/ has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <type_traits>

#include "core/cpu.h"
#include "core/cuda_error.h"
#include "core/graph.h"
#include "core/parallel.h"
#include "ops/attention.h"
#include "ops/dequantize.h"
#include "ops/embedding.h"
#include "ops/fault.h"
#include "ops/gated_delta_net.h"
#include "ops/main_memory.h"
#include "ops/moe.h"
#include "ops/pack.h"
#include "ops/quant_matmul.h"
#include "ops/quantize.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/sample.h"
#include "ops/sigmoid_mul.h"
#include "ops/silu_mul.h"
#include "ops/weight_loader.h"

namespace py = pybind11;
namespace helexa {
namespace {

// Pointers cross the boundary as integers.
template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T unwire(const Wire<T>& value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

// Wraps a CPU op: drops the GIL, and runs it or records it into the graph that the thread captures.
template <class... Args>
auto cpu(void (*op)(Args...)) {
  return [op](Wire<Args>... args) {
    py::gil_scoped_release unlocked;
    launch([op, args...] { op(unwire<Args>(args)...); });
  };
}

// Wraps a CUDA op, whose last argument is the stream.
template <class... Args>
[[maybe_unused]] auto cuda(void (*op)(Args...)) {
  return [op](Wire<Args>... args) {
    py::gil_scoped_release unlocked;
    op(unwire<Args>(args)...);
  };
}

// CudaError of Python: a RuntimeError with the CUDA status as `code`.
void register_cuda_error(py::module_& m) {
  static const py::handle type = py::exception<CudaError>(m, "CudaError", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const CudaError& error) {
      py::object instance = type(error.what());
      instance.attr("code") = error.code();
      PyErr_SetObject(type.ptr(), instance.ptr());
    }
  });
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of helexa; private to helexa.ops and helexa.parallel.";

  m.def("cpu_isa", [] { return isa_name(cpu_isa()); });
  m.def("limit_isa", [](int highest) { limit_isa(static_cast<Isa>(highest)); });
  m.def("set_num_threads", &set_num_threads, py::call_guard<py::gil_scoped_release>());
  m.def("num_threads", &num_threads, py::call_guard<py::gil_scoped_release>());

  py::class_<CpuGraph>(m, "CpuGraph")
      .def(py::init<>())
      .def("begin_capture", &CpuGraph::begin_capture)
      .def("end_capture", &CpuGraph::end_capture)
      .def("replay", &CpuGraph::replay, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &CpuGraph::size);

  py::class_<WeightView>(m, "WeightView")
      .def(py::init([](int format, std::uintptr_t packed, int64_t rows, int64_t cols, std::uintptr_t bias) {
        return WeightView{format, reinterpret_cast<const uint8_t*>(packed), rows, cols,
                          reinterpret_cast<const float*>(bias)};
      }));
  py::class_<MoeWeights>(m, "MoeWeights")
      .def(py::init<WeightView, std::vector<WeightView>, std::vector<WeightView>, WeightView,
                    std::vector<WeightView>, std::vector<WeightView>>());
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_cpu", cpu(&pack_cpu));
  m.def("embedding_cpu", cpu(&embedding_cpu));
  m.def("quant_matmul_cpu", cpu(&quant_matmul_cpu));
  m.def("quantize_cpu", cpu(&quantize_cpu));
  m.def("rms_norm_cpu", cpu(&rms_norm_cpu));
  m.def("sigmoid_mul_cpu", cpu(&sigmoid_mul_cpu));
  m.def("silu_mul_cpu", cpu(&silu_mul_cpu));
  m.def("rope_table_cpu", cpu(&rope_table_cpu));
  m.def("rope_append_cpu", cpu(&rope_append_cpu));
  m.def("attention_cpu", cpu(&attention_cpu));
  m.def("gated_delta_net_cpu", cpu(&gated_delta_net_cpu));
  m.def("moe_route_cpu", cpu(&moe_route_cpu));
  m.def("moe_mlp_cpu", cpu(&moe_mlp_cpu));

  register_cuda_error(m);
#ifdef HELEXA_EMULATED_CUDA
  m.attr("cuda_is_emulated") = true;
#else
  m.attr("cuda_is_emulated") = false;
#endif
#ifdef HELEXA_WITH_CUDA
  m.attr("has_cuda") = true;
  py::class_<ByteRange>(m, "ByteRange").def(py::init<int, int64_t, int64_t>());
  py::class_<WeightLoader>(m, "WeightLoader")
      .def(py::init<>())
      .def("add", &WeightLoader::add)
      .def("close", &WeightLoader::close)
      .def("cancel", &WeightLoader::cancel)
      .def("done_bytes", &WeightLoader::done_bytes)
      .def("failure", &WeightLoader::failure);
  py::class_<WeightCarrier>(m, "WeightCarrier")
      .def(py::init<WeightLoader&, std::vector<std::uintptr_t>, std::vector<std::uintptr_t>, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t, std::uintptr_t>(),
           py::keep_alive<1, 2>())
      .def("work", &WeightCarrier::work, py::call_guard<py::gil_scoped_release>())
      .def("slot", &WeightCarrier::slot);
  m.def("reads_main_memory", &reads_main_memory);
  m.def("pin", &pin, py::call_guard<py::gil_scoped_release>());
  m.def("unpin", &unpin, py::call_guard<py::gil_scoped_release>());
  m.def("copy_runs_cuda", cuda(&copy_runs_cuda));
  m.def("tiled_bytes", &tiled_bytes);
  m.def("attention_cuda", cuda(&attention_cuda));
  m.def("is_attention_tiled", &is_attention_tiled);
  m.def("rope_append_cuda", cuda(&rope_append_cuda));
  m.def("rope_table_cuda", cuda(&rope_table_cuda));
  m.def("pack_cuda", cuda(&pack_cuda));
  m.def("dequantize_cuda", cuda(&dequantize_cuda));
  m.def("embedding_cuda", cuda(&embedding_cuda));
  m.def("embedding_table_cuda", cuda(&embedding_table_cuda));
  m.def("gated_delta_net_cuda", cuda(&gated_delta_net_cuda));
  m.def("gated_delta_net_workspace", &gated_delta_net_workspace);
  m.def("moe_route_cuda", cuda(&moe_route_cuda));
  m.def("moe_few_workspace_bytes", &moe_few_workspace_bytes);
  m.def("moe_few_cuda", cuda(&moe_few_cuda));
  m.def("moe_many_workspace_bytes", &moe_many_workspace_bytes);
  m.def("moe_many_cuda", cuda(&moe_many_cuda));
  m.def("quant_matmul_cuda", cuda(&quant_matmul_cuda));
  m.def("gated_matmul_cuda", cuda(&gated_matmul_cuda));
  m.def("add_norm_matmul_cuda", cuda(&add_norm_matmul_cuda));
  m.def("middle_matmul_workspace_bytes", &middle_matmul_workspace_bytes);
  m.def("middle_matmul_cuda", cuda(&middle_matmul_cuda));
  m.def("quantize_rows_cuda", cuda(&quantize_rows_cuda));
  m.def("quantize_cuda", cuda(&quantize_cuda));
  m.def("rms_norm_cuda", cuda(&rms_norm_cuda));
  m.def("sample_workspace_bytes", &sample_workspace_bytes);
  m.def("sample_cuda", cuda(&sample_cuda));
  m.def("silu_mul_cuda", cuda(&silu_mul_cuda));
  m.def("spin_cuda", cuda(&spin_cuda));
  m.def("trap_cuda", cuda(&trap_cuda));
#else
  m.attr("has_cuda") = false;
#endif
}

}  // namespace
}  // namespace helexa
