#pragma once

#include <cstdint>

// Makes a function available to kernels too when nvcc compiles.
#ifdef __CUDACC__
#define LEAF_HOST_DEVICE __host__ __device__
#else
#define LEAF_HOST_DEVICE
#endif

namespace leaf {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

LEAF_HOST_DEVICE constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Returns the address of element `index` of an array whose element type is known at run time only.
inline const void* offset(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}
inline void* offset(void* base, int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * size_of(dtype);
}

}  // namespace leaf
