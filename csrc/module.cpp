// SPDX-License-Identifier: Apache-2.0
// tenfold._C: build info and CPU capability, for Python. It touches no tensor and links no torch:
// the state lives in _ops.so, whose C functions are looked up here (the library is loaded already).
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace {

void* ops_library = nullptr;

void attach(const std::string& path) {
  ops_library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (ops_library == nullptr)
    throw std::runtime_error("tenfold._C: " + path + " is not loaded; import tenfold first");
}

template <class F>
F* symbol(const char* name) {
  void* found = ops_library != nullptr ? dlsym(ops_library, name) : nullptr;
  if (found == nullptr)
    throw std::runtime_error(std::string("tenfold._C: no symbol ") + name + " in _ops.so");
  return reinterpret_cast<F*>(found);
}

std::string text(const char* name) {
  return symbol<const char*()>(name)();
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  const auto at = symbol<const char*(int)>("tenfold_cpu_capability_at");
  for (int i = 0; at(i) != nullptr; ++i) names.emplace_back(at(i));
  return names;
}

bool set_cpu_capability(const std::string& name) {
  return symbol<int(const char*)>("tenfold_set_cpu_capability")(name.c_str()) == 0;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build info and CPU capability of tenfold's native library.";
  m.def("attach", &attach, "Bind to the loaded _ops.so at this path.");
  m.def("version", [] { return text("tenfold_version"); });
  m.def("build_cuda", [] { return text("tenfold_build_cuda"); });
  m.def("build_torch", [] { return text("tenfold_build_torch"); });
  m.def("build_compiler", [] { return text("tenfold_build_compiler"); });
  m.def("cpu_capability", [] { return text("tenfold_cpu_capability"); });
  m.def("cpu_capabilities", &cpu_capabilities, "Names this CPU supports, weakest first.");
  m.def("set_cpu_capability", &set_cpu_capability, "False if the name is unknown or unsupported.");
  m.def("last_error_kind", [] { return symbol<int()>("tenfold_last_error_kind")(); });
}
