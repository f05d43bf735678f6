// norm = sqrt(sum_h g_h^2), each row read from memory once.
//
// The plain sum of squares is right unless it left the range of float32. Only such a row is done
// again, from the cache, scaled by the power of two that brings its largest entry into [1, 2).

#include "leaf/grad_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "simd.h"

namespace leaf::cpu {
namespace {

// Below this, squares that were flushed or lost digits could matter.
constexpr double kSmallestPlainSum = 0x1p-100;

LEAF_CLONES Lanes sum_of_squares(const float* __restrict__ x, int64_t n, float scale) {
  alignas(64) float sum[kChains] = {};
  for_stretches(n, [&](int64_t begin, int64_t width) LEAF_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float scaled = x[begin + i] * scale;
      sum[i] += scaled * scaled;
    }
  });
  return fold(sum);
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

// Calls visit(values, n) for each block of a row.
template <class Visit>
void for_blocks(const void* row, DType dtype, int64_t width, const Visit& visit) {
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t n = std::min(kBlock, width - begin);
    visit(load_floats(offset(row, begin, dtype), dtype, n, buffer), n);
  }
}

double scaled_sum(const void* row, DType dtype, int64_t width, float scale) {
  WideLanes sum;
  for_blocks(row, dtype, width,
             [&](const float* x, int64_t n) { sum.add(sum_of_squares(x, n, scale)); });
  return sum.total();
}

float row_norm(const void* row, DType dtype, int64_t width) {
  const double sum = scaled_sum(row, dtype, width, 1.0f);
  const bool in_range = sum >= kSmallestPlainSum && sum <= std::numeric_limits<double>::max();
  if (in_range || std::isnan(sum)) return static_cast<float>(std::sqrt(sum));

  float largest = 0.0f;
  for_blocks(row, dtype, width, [&](const float* x, int64_t n) {
    largest = std::max(largest, largest_magnitude(x, n));
  });
  if (largest == 0.0f || std::isinf(largest)) return largest;
  // For a subnormal, 2^-exponent is itself out of range; 2^126 is enough.
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
