// The Python module `_C`: plans, which check what they are given once, and the launches. It knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../cpu/parallel.h"
#include "dispatch.h"

namespace py = pybind11;

namespace elle_fast {

void bind_pack_points(py::module_&);
void bind_elle_loss(py::module_&);

static std::map<std::string, std::string> facts() {
  std::map<std::string, std::string> found;
  found["compiler"] =
#if defined(__clang__)
      "Clang " __clang_version__;
#elif defined(__GNUC__)
      "GCC " __VERSION__;
#else
      "unknown";
#endif
  found["isas"] = compiled_isas(" ");
#if defined(ELLE_CUDA)
  found["cuda"] = ELLE_CUDA_ARCHITECTURES;
#endif
  return found;
}

static std::string cuda_probe() {
  const Kernels* cuda = cuda_kernels();
  if (cuda == nullptr) return "CUDA is not built";
  const int error = cuda->probe();
  return error == 0 ? "" : cuda->error_name(error);
}

}  // namespace elle_fast

PYBIND11_MODULE(_C, m) {
  using namespace elle_fast;

  m.doc() = "The compiled kernels of elle_fast. Not a public interface: arguments are addresses.";
  m.attr("version") = ELLE_VERSION;
  use_isa(isas().front());
  prepare_for_fork();
  m.def("forked", forked, "To be called in a child of fork that was there before this module.");

  m.def("isas", isas, "Instruction sets compiled in that this machine has, the widest first.");
  m.def("isa", [] { return cpu_kernels().name; }, "The instruction set in use.");
  m.def("use_isa", use_isa, py::arg("isa"), "Use the kernels for this instruction set.");
  m.def("facts", facts, "Compiler, instruction sets and CUDA architectures, as text.");
  m.def("cuda_built", [] { return cuda_kernels() != nullptr; });
  m.def("cuda_probe", cuda_probe, "Why the current device cannot run the kernels; empty if it can.");

  bind_pack_points(m);
  bind_elle_loss(m);
}
