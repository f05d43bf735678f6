#include "convert.h"

#include <cstring>

#include "simd.h"

namespace leaf::cpu {
namespace {

LEAF_CLONES void bfloat16_to_float32(const uint16_t* __restrict__ x, int64_t n,
                                     float* __restrict__ y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = from_bfloat16(x[i]);
}

LEAF_CLONES void float16_to_float32(const uint16_t* __restrict__ x, int64_t n,
                                    float* __restrict__ y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = from_float16(x[i]);
}

LEAF_CLONES void float32_to_bfloat16(const float* __restrict__ x, int64_t n,
                                     uint16_t* __restrict__ y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = to_bfloat16(x[i]);
}

LEAF_CLONES void float32_to_float16(const float* __restrict__ x, int64_t n,
                                    uint16_t* __restrict__ y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = to_float16(x[i]);
}

}  // namespace

const float* load_floats(const void* source, DType dtype, int64_t n, float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source);
  const auto* bits = static_cast<const uint16_t*>(source);
  (dtype == DType::kBFloat16 ? bfloat16_to_float32 : float16_to_float32)(bits, n, buffer);
  return buffer;
}

void store_floats(const float* source, int64_t n, DType dtype, void* target) {
  if (dtype == DType::kFloat32) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  auto* bits = static_cast<uint16_t*>(target);
  (dtype == DType::kBFloat16 ? float32_to_bfloat16 : float32_to_float16)(source, n, bits);
}

}  // namespace leaf::cpu
