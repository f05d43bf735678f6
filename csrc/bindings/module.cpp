// The module contains build_info() only; the ops are reached through torch.ops.leaf_ext. Python's
// limited API, not pybind11: one file then loads under every Python from 3.10 on.

#include <Python.h>

#include "leaf/matmul.h"
#include "pages.h"

namespace leaf::cpu {
const char* instruction_set();
}

namespace {

// Returns a tuple of the words of a text, or null with Python's error set.
PyObject* words(const char* text) {
  PyObject* whole = PyUnicode_FromString(text);
  PyObject* parts = whole != nullptr ? PyUnicode_Split(whole, nullptr, -1) : nullptr;
  PyObject* tuple = parts != nullptr ? PyList_AsTuple(parts) : nullptr;
  Py_XDECREF(parts);
  Py_XDECREF(whole);
  return tuple;
}

PyObject* build_info(PyObject*, PyObject*) {
  // "N" takes a reference over, and passes on the error that a null stands for. "torch" is the
  // version that it was built with.
  // clang-format off
  return Py_BuildValue(
      "{s:s, s:s, s:s, s:N, s:N, s:N, s:s, s:N}",
      "version", LEAF_VERSION,
      "torch", LEAF_TORCH_VERSION,
      "compiler", LEAF_COMPILER,
      "backends", words(LEAF_BACKENDS),
      "architectures", words(LEAF_ARCHITECTURES),
      "cuda_architectures", words(LEAF_CUDA_ARCHITECTURES),
      "instruction_set", leaf::cpu::instruction_set(),
      "amx", PyBool_FromLong(leaf::cpu::has_amx()));
  // clang-format on
}

PyObject* prefer_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address = 0;
  Py_ssize_t bytes = 0;
  if (!PyArg_ParseTuple(arguments, "Kn", &address, &bytes)) return nullptr;
  leaf::bindings::prefer_huge_pages(reinterpret_cast<void*>(static_cast<uintptr_t>(address)),
                                    static_cast<size_t>(bytes));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What was built, and which instruction set the CPU kernels use on this machine."},
    {"prefer_huge_pages", prefer_huge_pages, METH_VARARGS,
     "Asks for huge pages for fresh memory that is about to be written."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Compiled kernels of leaf_ext.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
