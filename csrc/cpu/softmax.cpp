#include "softmax.h"

#include <cmath>
#include <limits>

#include "convert.h"

namespace leaf::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// NaN does not show in it. Two chains, so that comparisons do not wait for each other.
LEAF_CLONES float maximum(const float* __restrict__ y, int64_t n) {
  const int64_t half = n / 2;
  float low = y[n - 1] > -kInfinity ? y[n - 1] : -kInfinity;
  float high = low;
#pragma omp simd reduction(max : low, high)
  for (int64_t i = 0; i < half; ++i) {
    low = low < y[i] ? y[i] : low;
    high = high < y[half + i] ? y[half + i] : high;
  }
  return low < high ? high : low;
}

// What lies at `next`, where the following block is, is asked for during the arithmetic: all at
// once it would fill the processor's queue of requests and stop it.
struct Next {
  const void* data;
  int64_t element_size;
};

template <bool kMoment>
LEAF_INLINE BlockStatistics exponentials(const float* __restrict__ y, int64_t n, float temperature,
                                         Next next, float* __restrict__ exps) {
  const float max = maximum(y, n);
  const float base = max == -kInfinity ? 0.0f : max;
  const float scale = kLog2e / temperature;
  const float lowest = -127.0f / scale;
  alignas(64) float sum[kChains] = {};
  alignas(64) float moment[kChains] = {};
  for_stretches(n, [&](int64_t begin, int64_t width) LEAF_INLINE_LAMBDA {
    prefetch(next.data, begin * next.element_size, (begin + width) * next.element_size);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float x = y[begin + i] - base;
      const float e = exp2_nonpositive(x, scale, lowest);
      exps[begin + i] = e;
      sum[i] += e;
      if constexpr (kMoment) moment[i] += e * (lowest > x ? lowest : x);  // 0, not NaN, for -inf
    }
  });
  return {max, fold(sum), fold(moment)};
}

LEAF_CLONES BlockStatistics exponentiate(const float* y, int64_t n, float temperature, Next next,
                                         float* exps) {
  return exponentials<false>(y, n, temperature, next, exps);
}

LEAF_CLONES BlockStatistics exponentiate_with_moment(const float* y, int64_t n, float temperature,
                                                     Next next, float* exps) {
  return exponentials<true>(y, n, temperature, next, exps);
}

// x and y may be the same.
LEAF_CLONES void multiply(const float* x, int64_t n, float factor, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

// y = cap tanh(scale z / cap) and slope = dy/d(scale z); y and z may be the same.
LEAF_CLONES void cap_logits(const float* z, int64_t n, float scale, float cap, float* y,
                            float* __restrict__ slope) {
  const float inner = scale / cap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float local;
    y[i] = cap * tanh_and_slope(z[i] * inner, &local);
    slope[i] = local;
  }
}

}  // namespace

const void* SoftmaxRow::address(int64_t row, int64_t block) const {
  return offset(logits_.data, row * logits_.row_stride + block * kBlock, logits_.dtype);
}

const float* SoftmaxRow::load(int64_t row, int64_t block, float* buffer, float* slope) const {
  const int64_t n = block_size(block);
  const float* z = load_floats(address(row, block), logits_.dtype, n, buffer);
  if (logits_.softcap != 0.0f) {
    cap_logits(z, n, logits_.scale, logits_.softcap, buffer, slope);
    return buffer;
  }
  if (logits_.scale == 1.0f) return z;
  multiply(z, n, logits_.scale, buffer);
  return buffer;
}

void SoftmaxRow::compute_block(int64_t row, int64_t block) {
  alignas(64) float buffer[kBlock];
  alignas(64) float slope[kBlock];
  const int64_t n = block_size(block);
  const float* y = load(row, block, buffer, slope);
  const Next next{address(row, block + 1), size_of(logits_.dtype)};
  statistics_[block] = (with_entropy_ ? exponentiate_with_moment : exponentiate)(
      y, n, static_cast<float>(temperature_), next, exps_.data() + block * kBlock);
}

void SoftmaxRow::merge() {
  const int64_t blocks = block_count(vocab_);
  max_block_ = 0;
  for (int64_t i = 1; i < blocks; ++i) {
    if (statistics_[i].max > statistics_[max_block_].max) max_block_ = i;
  }
  max_ = statistics_[max_block_].max;
  WideLanes sum;
  WideLanes moment;
  for (int64_t i = 0; i < blocks; ++i) {
    const BlockStatistics& block = statistics_[i];
    const bool empty = block.max == -kInfinity;  // only logits of -inf (or NaN: its sum is kept)
    const double shift = empty ? 0.0 : block.max - max_;
    const double weight = std::exp(shift / temperature_);
    factor_[i] = static_cast<float>(weight);
    sum.add(block.sum, weight);
    moment.add(block.moment, weight);
    moment.add(block.sum, weight * shift);
  }
  const double total = sum.total();
  for (float& factor : factor_) factor = static_cast<float>(factor / total);
  log_sum_ = std::log(total);
  entropy_ = log_sum_ - moment.total() / (total * temperature_);
}

int64_t SoftmaxRow::argmax(int64_t row) const {
  // A softcap, or the rounding of a scale, can make one number of two logits.
  const bool distinct = logits_.softcap == 0.0f && logits_.scale == 1.0f;
  const int64_t first = distinct ? max_block_ : 0;
  const int64_t last = distinct ? max_block_ : block_count(vocab_) - 1;
  alignas(64) float buffer[kBlock];
  int64_t argmax = first * kBlock;
  float max = -kInfinity;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t n = block_size(block);
    const float* z = load_floats(address(row, block), logits_.dtype, n, buffer);
    const float block_max = maximum(z, n);
    if (block_max <= max) continue;
    max = block_max;
    argmax = block * kBlock + (std::find(z, z + n, max) - z);
  }
  return argmax;
}

}  // namespace leaf::cpu
