// to = from * factor, block by block. The product is made in float32 and rounded once.

#include "leaf/scale.h"

#include <algorithm>

#include "convert.h"
#include "simd.h"

namespace leaf::cpu {
namespace {

// x and y may be the same array.
LEAF_CLONES void multiply(const float* x, float factor, int64_t n, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

void scale_block(const ScaleParams& params, int64_t row, int64_t begin, int64_t n, float factor) {
  alignas(64) float buffer[kBlock];
  const DType dtype = params.to_dtype;
  void* target = offset(params.to, row * params.to_row_stride + begin, dtype);
  const float* x =
      load_floats(offset(params.from, row * params.from_row_stride + begin, params.from_dtype),
                  params.from_dtype, n, buffer);
  float* y = dtype == DType::kFloat32 ? static_cast<float*>(target) : buffer;
  multiply(x, factor, n, y);
  if (y != target) store_floats(y, n, dtype, target);
}

}  // namespace

void scale(const ScaleParams& params, const Threads& threads) {
  const float factor = *params.factor;
  if (params.from == params.to && factor == 1.0f) return;
  const int64_t blocks = (params.width + kBlock - 1) / kBlock;
  threads.for_ranges(params.rows * blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % blocks * kBlock;
      scale_block(params, i / blocks, start, std::min(kBlock, params.width - start), factor);
    }
  });
}

}  // namespace leaf::cpu
