// The pybind11 module: facts about this build. Plain types only, no torch in it.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = std::string(__VERSION__);
  info["flags"] = DRE_FAST_FLAGS;
  info["torch"] = DRE_FAST_TORCH;
  info["cuda_archs"] = DRE_FAST_CUDA_ARCHS;
  info["cuda"] = std::string(DRE_FAST_CUDA_ARCHS).size() > 0;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the compiled parts of dre_fast.";
  m.def(
      "build_info", &build_info,
      "compiler and flags, the torch whose headers were used, cuda (bool) and the architectures it was built for");
}
