#include "softmax.h"

#include <cmath>
#include <limits>

#include "convert.h"

namespace leaf::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Returns the maximum; NaN is ignored. Several partial maxima make the comparisons independent.
template <class Element>
LEAF_INLINE float largest(const Element* __restrict__ y, int64_t n) {
  alignas(64) float max[kChains];
  std::fill(max, max + kChains, -kInfinity);
  int64_t begin = 0;
  for (; begin + kChains <= n; begin += kChains) {
    const Element* stretch = y + begin;
#pragma omp simd
    for (int64_t i = 0; i < kPairs; ++i) {
      const int64_t j = kPairs + i;
      const float first = load_first(stretch, i);
      const float second = load_second(stretch, i);
      max[i] = max[i] < first ? first : max[i];
      max[j] = max[j] < second ? second : max[j];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n - begin; ++i) {
    const float value = load(y + begin + i);
    max[i] = max[i] < value ? value : max[i];
  }
  float result = -kInfinity;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < kChains; ++i) result = result < max[i] ? max[i] : result;
  return result;
}

LEAF_CLONES float maximum(const float* y, int64_t n) { return largest(y, n); }

// The following block, at `next`, is prefetched piece by piece during the arithmetic: all at once
// would fill the processor's queue of memory requests and stall it.
struct Next {
  const void* data;
  int64_t element_size;
};

template <bool kMoment, class Element>
LEAF_INLINE BlockStatistics exponentials(const Element* __restrict__ y, int64_t n,
                                         float temperature, Next next, float* __restrict__ exps) {
  const float max = largest(y, n);
  const float base = max == -kInfinity ? 0.0f : max;
  const float scale = kLog2e / temperature;
  const float lowest = -127.0f / scale;
  alignas(64) float sum[kChains] = {};
  alignas(64) float moment[kChains] = {};
  const auto add = [&](float value, float* exp, int64_t chain) LEAF_INLINE_LAMBDA {
    const float x = value - base;
    const float e = exp2_nonpositive(x, scale, lowest);
    *exp = e;
    sum[chain] += e;
    if constexpr (kMoment) moment[chain] += e * (lowest > x ? lowest : x);  // 0, not NaN, for -inf
  };
  int64_t begin = 0;
  for (; begin + kChains <= n; begin += kChains) {
    prefetch(next.data, begin * next.element_size, (begin + kChains) * next.element_size);
#pragma omp simd
    for (int64_t i = 0; i < kPairs; ++i) {
      const int64_t j = kPairs + i;
      add(load_first(y + begin, i), exps + begin + i, i);
      add(load_second(y + begin, i), exps + begin + j, j);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n - begin; ++i) add(load(y + begin + i), exps + begin + i, i);
  return {max, fold(sum), fold(moment)};
}

using Exponentiate = BlockStatistics(const void* y, int64_t n, float temperature, Next next,
                                     float* exps);

LEAF_CLONES BlockStatistics float32(const void* y, int64_t n, float temperature, Next next,
                                    float* exps) {
  return exponentials<false>(static_cast<const float*>(y), n, temperature, next, exps);
}
LEAF_CLONES BlockStatistics bfloat16(const void* y, int64_t n, float temperature, Next next,
                                     float* exps) {
  return exponentials<false>(static_cast<const BFloat16*>(y), n, temperature, next, exps);
}
LEAF_CLONES BlockStatistics float32_with_moment(const void* y, int64_t n, float temperature,
                                                Next next, float* exps) {
  return exponentials<true>(static_cast<const float*>(y), n, temperature, next, exps);
}
LEAF_CLONES BlockStatistics bfloat16_with_moment(const void* y, int64_t n, float temperature,
                                                 Next next, float* exps) {
  return exponentials<true>(static_cast<const BFloat16*>(y), n, temperature, next, exps);
}

// x and y may be the same array.
LEAF_CLONES void multiply(const float* x, int64_t n, float factor, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

// Computes y = cap tanh(scale z / cap) and slope = dy/d(scale z); y and z may be the same array.
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

const float* activate(const Logits& logits, const float* z, int64_t n, float* y, float* slope) {
  if (logits.softcap != 0.0f) {
    cap_logits(z, n, logits.scale, logits.softcap, y, slope);
    return y;
  }
  if (logits.scale == 1.0f) return z;
  multiply(z, n, logits.scale, y);
  return y;
}

const void* SoftmaxRow::address(int64_t row, int64_t block) const {
  return offset(logits_.data, row * logits_.row_stride + block * kRowBlock, logits_.dtype);
}

const void* SoftmaxRow::load(int64_t row, int64_t block, float* buffer, float* slope) const {
  if (narrow_) return address(row, block);
  const int64_t n = block_size(block);
  const float* z = load_floats(address(row, block), logits_.dtype, n, buffer);
  return without_excluded(activate(logits_, z, n, buffer, slope), block, buffer);
}

// Returns a block of values with -inf in the excluded columns.
const float* SoftmaxRow::without_excluded(const float* values, int64_t block, float* buffer) const {
  if (excluded_ == nullptr || first_excluded_[block] == first_excluded_[block + 1]) return values;
  if (values != buffer) std::copy(values, values + block_size(block), buffer);
  for (int32_t i = first_excluded_[block]; i < first_excluded_[block + 1]; ++i) {
    buffer[excluded_[i] - block * kRowBlock] = -kInfinity;
  }
  return buffer;
}

void SoftmaxRow::compute_block(int64_t row, int64_t block) {
  alignas(64) float buffer[kRowBlock];
  alignas(64) float slope[kRowBlock];
  const void* y = load(row, block, buffer, slope);
  const Next next{address(row, block + 1), size_of(logits_.dtype)};
  Exponentiate* const exponentiate = narrow_ ? (with_entropy_ ? bfloat16_with_moment : bfloat16)
                                             : (with_entropy_ ? float32_with_moment : float32);
  statistics_[block] = exponentiate(y, block_size(block), static_cast<float>(temperature_), next,
                                    exps_ + block * kRowBlock);
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
    const bool empty =
        block.max == -kInfinity;  // all logits are -inf or NaN; the sum of the latter is kept
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

SoftmaxRow::Largest SoftmaxRow::largest(int64_t row) const {
  // A softcap, or the rounding of a scaled logit, can make two different logits equal.
  const bool distinct = logits_.softcap == 0.0f && logits_.scale == 1.0f;
  const int64_t first = distinct ? max_block_ : 0;
  const int64_t last = distinct ? max_block_ : block_count(vocab_) - 1;
  alignas(64) float buffer[kRowBlock];
  Largest found{-kInfinity, first * kRowBlock};
  for (int64_t block = first; block <= last; ++block) {
    const int64_t n = block_size(block);
    const float* z =
        without_excluded(load_floats(address(row, block), logits_.dtype, n, buffer), block, buffer);
    const float block_max = maximum(z, n);
    if (block_max <= found.value) continue;
    found = {block_max, block * kRowBlock + (std::find(z, z + n, block_max) - z)};
  }
  return found;
}

}  // namespace leaf::cpu
