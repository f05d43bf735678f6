// The module contains build_info() only; the ops are reached through torch.ops.leaf_ext.

#include <pybind11/pybind11.h>

#include "leaf/matmul.h"
#include "pages.h"

namespace leaf::cpu {
const char* instruction_set();
}

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of leaf_ext.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = LEAF_VERSION;
        info["torch"] = LEAF_TORCH_VERSION;  // the version it was built with
        info["compiler"] = LEAF_COMPILER;
        const auto words = [](const char* text) {
          return py::tuple(py::str(text).attr("split")());
        };
        info["backends"] = words(LEAF_BACKENDS);
        info["architectures"] = words(LEAF_ARCHITECTURES);
        info["cuda_architectures"] = words(LEAF_CUDA_ARCHITECTURES);
        info["instruction_set"] = leaf::cpu::instruction_set();
        info["amx"] = leaf::cpu::has_amx();
        return info;
      },
      "What was built, and which instruction set the CPU kernels use on this machine.");
  module.def(
      "prefer_huge_pages",
      [](uintptr_t address, size_t bytes) {
        leaf::bindings::prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      "Asks for huge pages for fresh memory that is about to be written.");
}
