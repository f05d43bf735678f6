#pragma once

// Element types of tensors: bits in memory, float32 in registers. A word has two elements of 16
// bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "leaf/dtype.h"

namespace leaf::cuda {

// Converts a pair of elements to one word; CUDA's pair types are classes, not plain bits.
template <class Pair>
__device__ __forceinline__ uint32_t word_of(const Pair& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class Pair>
__device__ __forceinline__ Pair pair_of(const uint32_t& word) {
  return *reinterpret_cast<const Pair*>(&word);
}

struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kMinusInfinities = 0xff800000u;
  static __device__ __forceinline__ float load(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits store(float x) { return __float_as_uint(x); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kMinusInfinities = 0xfc00fc00u;
  static __device__ __forceinline__ float load(Bits bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ Bits store(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ float low(uint32_t word) {
    return load(static_cast<Bits>(word));
  }
  static __device__ __forceinline__ float high(uint32_t word) {
    return load(static_cast<Bits>(word >> 16));
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return word_of(__floats2half2_rn(low, high));
  }
  // Returns the larger element of each half; a NaN loses.
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return word_of(__hmax2(pair_of<__half2>(a), pair_of<__half2>(b)));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kMinusInfinities = 0xff80ff80u;
  static __device__ __forceinline__ float load(Bits bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ Bits store(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(uint32_t word) {
    return __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return word_of(__floats2bfloat162_rn(low, high));
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return word_of(__hmax2(pair_of<__nv_bfloat162>(a), pair_of<__nv_bfloat162>(b)));
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
