#pragma once

// Element types of tensors: bits in memory, float32 in registers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "leaf/dtype.h"

namespace leaf::cuda {

struct Float32 {
  using Bits = uint32_t;
  static __device__ __forceinline__ float load(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits store(float x) { return __float_as_uint(x); }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float load(Bits bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ Bits store(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float load(Bits bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ Bits store(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
};

// Calls visit(Float32{}), visit(Float16{}) or visit(BFloat16{}).
template <class Visit>
auto with_element(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    default:
      return visit(Float32{});
  }
}

}  // namespace leaf::cuda
