#pragma once

// Checks of memory safety, and the tensor accessors that the bindings need. They use LibTorch's
// stable ABI, so that one build loads under every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "leaf/dtype.h"

namespace leaf::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Builds text without the standard library's streams. Streams break in an extension that has its
// own copy of the library, because both copies share the state of the locales.
inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
template <class Number>
std::string text_of(Number number) {
  if constexpr (std::is_integral_v<Number>) {
    return std::to_string(number);
  } else {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(number));
    return text;
  }
}

// check(condition, "op: argument must be X, got ", value)
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  throw std::runtime_error((std::string() + ... + text_of(parts)));
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "scalar type " + std::to_string(static_cast<int>(dtype));
  }
}
inline std::string dtype_name(const Tensor& tensor) { return dtype_name(tensor.scalar_type()); }

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

// A kernel reads the memory of its own device only.
inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& first) {
  const bool same = tensor.is_cpu() == first.is_cpu() && tensor.is_cuda() == first.is_cuda() &&
                    tensor.get_device_index() == first.get_device_index();
  check(same, op, ": ", name, " must be on the device of the other tensors");
}

// The dtype of a tensor that a kernel may read as float values.
inline DType float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      check(false, op, ": ", name, " must be float32, float16 or bfloat16, got ",
            dtype_name(tensor));
      return DType::kFloat32;
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                        const char* needed) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", needed, ", got ",
        dtype_name(tensor));
}

template <class T>
T* data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace leaf::bindings
