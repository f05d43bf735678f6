// norm = sqrt(sum_h g_h^2). Each row is read from memory once.
//
// The plain sum of squares is right unless it leaves the range of float32. Such a row is computed
// again from the cache, scaled by the power of two that brings its largest entry into [1, 2).

#include "leaf/grad_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "simd.h"

namespace leaf::cpu {
namespace {

// Below this sum, squares that underflowed could matter.
constexpr double kSmallestPlainSum = 0x1p-100;

// The prefetch distance. It may pass the end of the row, because the next row usually follows.
constexpr int64_t kPrefetchBytes = 4096;

// The sum of the squares of scale * load(x[i]).
template <class T, class Load>
LEAF_INLINE double sum_of_squares(const T* x, int64_t n, float scale, const Load& load) {
  constexpr int64_t kSize = sizeof(T);
  WideLanes total;
  for (int64_t block = 0; block < n; block += kBlock) {
    alignas(64) float sum[kChains] = {};
    for_stretches(std::min(kBlock, n - block),
                  [&](int64_t begin, int64_t width) LEAF_INLINE_LAMBDA {
                    const T* part = x + block + begin;
                    prefetch(part, kPrefetchBytes, kPrefetchBytes + kChains * kSize);
#pragma omp simd
                    for (int64_t i = 0; i < width; ++i) {
                      const float scaled = load(part[i]) * scale;
                      sum[i] += scaled * scaled;
                    }
                  });
    total.add(fold(sum));
  }
  return total.total();
}

LEAF_CLONES double sum_of_float32(const float* x, int64_t n, float scale) {
  return sum_of_squares(x, n, scale, [](float value) LEAF_INLINE_LAMBDA { return value; });
}

LEAF_CLONES double sum_of_bfloat16(const uint16_t* x, int64_t n, float scale) {
  return sum_of_squares(x, n, scale, from_bfloat16);
}

LEAF_CLONES double sum_of_float16(const uint16_t* x, int64_t n, float scale) {
  return sum_of_squares(x, n, scale, from_float16);
}

double scaled_sum(const void* row, DType dtype, int64_t width, float scale) {
  if (dtype == DType::kFloat32) return sum_of_float32(static_cast<const float*>(row), width, scale);
  const auto* bits = static_cast<const uint16_t*>(row);
  return (dtype == DType::kBFloat16 ? sum_of_bfloat16 : sum_of_float16)(bits, width, scale);
}

LEAF_CLONES float largest_magnitude(const float* __restrict__ x, int64_t n) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = x[i] < 0.0f ? -x[i] : x[i];
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest;
}

float largest_of_row(const void* row, DType dtype, int64_t width) {
  alignas(64) float buffer[kBlock];
  float largest = 0.0f;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t n = std::min(kBlock, width - begin);
    const float* x = load_floats(offset(row, begin, dtype), dtype, n, buffer);
    largest = std::max(largest, largest_magnitude(x, n));
  }
  return largest;
}

float row_norm(const void* row, DType dtype, int64_t width) {
  const double sum = scaled_sum(row, dtype, width, 1.0f);
  const bool in_range = sum >= kSmallestPlainSum && sum <= std::numeric_limits<double>::max();
  if (in_range || std::isnan(sum)) return static_cast<float>(std::sqrt(sum));

  const float largest = largest_of_row(row, dtype, width);
  if (largest == 0.0f || std::isinf(largest)) return largest;
  // 2^-exponent of a subnormal is out of range; 2^126 is enough.
  const int shift = std::clamp(-std::ilogb(largest), -126, 126);
  const double scaled = scaled_sum(row, dtype, width, std::ldexp(1.0f, shift));
  return static_cast<float>(std::ldexp(std::sqrt(scaled), -shift));
}

}  // namespace

void grad_norm(const GradNormParams& params, const Threads& threads) {
  const RowsView& grad = params.grad;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, grad.width));
  threads.for_ranges(grad.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start =
          (i / grad.inner) * grad.outer_stride + (i % grad.inner) * grad.inner_stride;
      params.norm[i] = row_norm(offset(grad.data, start, grad.dtype), grad.dtype, grad.width);
    }
  });
}

}  // namespace leaf::cpu
