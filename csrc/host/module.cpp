// The pybind11 module: facts about this build. Plain types only, no torch in it.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;

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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the compiled parts of dre_fast.";
  m.def(
      "build_info", &build_info,
      "compiler version and flags, the torch whose headers were used, cuda (bool) and its architectures");
}
