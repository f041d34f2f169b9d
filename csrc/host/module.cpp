// The pybind11 module: facts about this build, the file of rows, pixels in planes. Plain types only, no torch in it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <system_error>

#include "planes.h"
#include "row_file.h"

namespace py = pybind11;
using dre_fast::Pages;
using dre_fast::RowFile;

namespace {

py::dict build_info() {
  py::list archs;
  std::istringstream listed(DRE_FAST_CUDA_ARCHS);
  for (std::string arch; std::getline(listed, arch, ';');) archs.append(arch);
  py::dict info;
  info["compiler_version"] = __VERSION__;
  info["flags"] = DRE_FAST_FLAGS;
  info["torch"] = DRE_FAST_TORCH;
  info["cuda_archs"] = archs;
  info["cuda"] = !archs.empty();
  return info;
}

// Bytes that keep their pages alive for as long as the array, or a tensor made of it, lives.
py::array_t<uint8_t> as_array(const std::shared_ptr<Pages>& pages) {
  const py::capsule owner(new std::shared_ptr<Pages>(pages), [](void* p) { delete static_cast<std::shared_ptr<Pages>*>(p); });
  return py::array_t<uint8_t>({pages->bytes()}, {1}, reinterpret_cast<uint8_t*>(pages->data()), owner);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void split_planes(const Bytes& pixels, Bytes& planes) {
  if (pixels.ndim() != 3 || (pixels.shape(2) != 3 && pixels.shape(2) != 4))
    throw std::invalid_argument("split_planes: pixels must be [h, w, 3] or [h, w, 4]");
  if (planes.ndim() != 3 || planes.shape(0) != 3 || planes.shape(1) != pixels.shape(0) ||
      planes.shape(2) != pixels.shape(1))
    throw std::invalid_argument("split_planes: planes must be [3, h, w], as high and wide as pixels");
  const uint8_t* from = pixels.data();
  uint8_t* to = planes.mutable_data();  // throws where it is read-only
  const int channels = static_cast<int>(pixels.shape(2));
  const int64_t n = pixels.shape(0) * pixels.shape(1);
  const py::gil_scoped_release no_gil;
  dre_fast::split_planes(from, channels, n, to);
}

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::dict statistics(RowFile& file) {
  const RowFile::Statistics s = file.statistics();
  py::dict out;
  out["reads"] = s.reads;
  out["writes"] = s.writes;
  out["bytes_read"] = s.bytes_read;
  out["bytes_written"] = s.bytes_written;
  out["busy_seconds"] = s.busy_seconds;
  out["wait_seconds"] = s.wait_seconds;
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() =
      "Facts about the compiled parts of dre_fast, the file behind a memory bank larger than memory, pixels in planes.";
  m.def(
      "build_info", &build_info,
      "compiler version and flags, the torch whose headers were used, cuda (bool) and its architectures");

  m.def(
      "split_planes", &split_planes, py::arg("pixels").noconvert(), py::arg("planes").noconvert(),
      "uint8 [h, w, 3 or 4] -> the first three channels, copied into uint8 [3, h, w]");

  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<RowFile, std::unique_ptr<RowFile, RowFile::Owner>>(
      m, "RowFile", "A nameless file of rows, a ring of rows in memory, threads that copy between them.")
      .def(
          py::init<const std::string&, int64_t, int64_t, int64_t, int>(), py::arg("folder"), py::arg("rows"),
          py::arg("row_bytes"), py::arg("ring_rows"), py::arg("threads"), no_gil)
      .def("read", &RowFile::read, py::arg("first"), py::arg("rows"), py::arg("at"), py::arg("after"), no_gil,
           "file rows into the ring -> job number")
      .def("write", &RowFile::write, py::arg("from_"), py::arg("to"), py::arg("after"), no_gil,
           "ring rows into the file -> job number")
      .def("done", &RowFile::done, py::arg("job"), no_gil, "True, or False while under way; raises what it failed with")
      .def(
          "wait", [](RowFile& file, RowFile::Job job) { file.wait(job, check_signals); }, py::arg("job"), no_gil,
          "wait for a job; raises what it failed with")
      .def(
          "resize", [](RowFile& file, int64_t rows) { file.resize(rows, check_signals); }, py::arg("rows"), no_gil)
      .def("close", &RowFile::close, no_gil, "drop jobs not begun and join the threads")
      .def("ring", [](const RowFile& file) { return as_array(file.ring()); }, "uint8 [ring_rows x row_bytes]")
      .def("map", [](RowFile& file) { return as_array(file.map()); }, "uint8 [rows x row_bytes], the file itself")
      .def("fileno", &RowFile::fd)
      .def_property_readonly("rows", &RowFile::rows)
      .def("statistics", &statistics);
}
