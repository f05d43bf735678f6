// loss = T^2 sum_i w_i KL(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum, d = sum_v exp((y - m) / T) and p = exp((y - m) / T) / d:
//
//     l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
//     KL   = sum_v p_s - p_t + p_t l
//     grad = w T (p_s - p_t) dy_s/dz_s
//
// If l is small, p_s - p_t = p_t (phi - l) and the term of the sum is p_t phi. The series of
// phi = exp(-l) - 1 + l >= 0 avoids cancellation, and an error of d enters squared. The maxima are
// subtracted first, so that an offset between the two models does not cost accuracy.
//
// There are two phases, each block by block: the softmax of both models, then the terms of loss and
// gradient. The row pair stays in the second-level cache between them. Blocks are merged in a fixed
// order, so that results do not depend on the number of threads.

#include "leaf/dual_kl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.h"
#include "pairs.h"
#include "scratch.h"
#include "simd.h"
#include "softmax.h"
#include "subnormals.h"
#include "zero.h"

namespace leaf::cpu {
namespace {

struct TermScalars {
  float inv_temperature;
  float max_s, max_t;
  float log_ratio;  // log d_s - log d_t
  float grad_scale;
};

// A block of one model's probabilities: p = exps * factor.
struct Side {
  const void* y;
  const float* exps;
  float factor;
};

// Returns p_s - p_t and stores p_s - p_t + p_t l in `term`.
LEAF_INLINE float difference_and_term(float ps, float pt, float log_ratio, float* term) {
  const float l =
      pt == 0.0f ? 1.0f : log_ratio;  // any number but NaN, which arises if both are -inf
  float series = -1.0f / 5040;
  series = series * l + 1.0f / 720;
  series = series * l - 1.0f / 120;
  series = series * l + 1.0f / 24;
  series = series * l - 1.0f / 6;
  series = series * l + 1.0f / 2;
  const float square = l * l;
  const float phi = series * square;
  const bool near = square < 0.25f;
  const float difference = near ? pt * (phi - l) : ps - pt;
  *term = near ? pt * phi : difference + pt * l;
  return difference;
}

// Writes grad_scale * (p_s - p_t), which may overwrite student.y, and returns the sum of the terms.
template <class Element>
LEAF_INLINE Lanes terms(const Side& student, const Side& teacher, int64_t n, const TermScalars& row,
                        Element* grad) {
  const Element* ys = static_cast<const Element*>(student.y);
  const Element* yt = static_cast<const Element*>(teacher.y);
  alignas(64) float sum[kChains] = {};
  const auto gradient = [&](float s, float t, int64_t at, int64_t chain) LEAF_INLINE_LAMBDA {
    const float apart = (t - row.max_t) - (s - row.max_s);
    const float log_ratio = apart * row.inv_temperature + row.log_ratio;
    float term;
    const float difference = difference_and_term(
        student.exps[at] * student.factor, teacher.exps[at] * teacher.factor, log_ratio, &term);
    sum[chain] += term;
    return row.grad_scale * difference;
  };
  int64_t begin = 0;
  for (; begin + kChains <= n; begin += kChains) {
#pragma omp simd
    for (int64_t i = 0; i < kPairs; ++i) {
      const int64_t j = kPairs + i;
      const float first =
          gradient(load_first(ys + begin, i), load_first(yt + begin, i), begin + i, i);
      const float second =
          gradient(load_second(ys + begin, i), load_second(yt + begin, i), begin + j, j);
      store_pair(first, second, grad + begin, i);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n - begin; ++i) {
    store(gradient(load(ys + begin + i), load(yt + begin + i), begin + i, i), grad + begin + i);
  }
  return fold(sum);
}

LEAF_CLONES Lanes float32_terms(const Side student, const Side teacher, int64_t n,
                                const TermScalars row, void* grad) {
  return terms(student, teacher, n, row, static_cast<float*>(grad));
}
LEAF_CLONES Lanes bfloat16_terms(const Side student, const Side teacher, int64_t n,
                                 const TermScalars row, void* grad) {
  return terms(student, teacher, n, row, static_cast<BFloat16*>(grad));
}

LEAF_CLONES void multiply(float* __restrict__ x, const float* __restrict__ factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

int64_t common_vocab(const DualKLParams& params) {
  return std::min(params.student.vocab, params.teacher.vocab);
}

// The factor of p_s - p_t in a row's gradient, without the derivative of the softcap.
float gradient_bound(const DualKLParams& params, int64_t row) {
  return params.row_weight[row] * params.temperature * params.student.scale;
}

// Zeroes a row's gradient from element `begin` on.
void zero_gradient(const DualKLParams& params, int64_t row, int64_t begin, bool uncached) {
  if (params.grad == nullptr || begin == params.student.vocab) return;
  const DType dtype = params.student.dtype;
  void* grad = offset(params.grad, row * params.grad_row_stride + begin, dtype);
  const auto bytes = static_cast<size_t>((params.student.vocab - begin) * size_of(dtype));
  if (uncached) {
    zero_uncached(grad, bytes);
  } else {
    std::memset(grad, 0, bytes);
  }
}

void skip_row(const DualKLParams& params, int64_t row, bool uncached) {
  zero_gradient(params, row, 0, uncached);
  if (params.row_results == nullptr) return;
  for (int64_t i = 0; i < 4; ++i) params.row_results[i * params.rows + row] = 0.0f;
}

// Computes rows one after another; the buffers are reused.
class RowKernel {
 public:
  RowKernel(const DualKLParams& params, double* kl)
      : params_(params),
        kl_(kl),
        blocks_(SoftmaxRow::block_count(common_vocab(params))),
        narrow_(SoftmaxRow::is_narrow(params.student) && SoftmaxRow::is_narrow(params.teacher)),
        scratch_(2 * SoftmaxRow::scratch_size(common_vocab(params))),
        student_(softmax_row(params.student, scratch_.data())),
        teacher_(softmax_row(params.teacher,
                             scratch_.data() + SoftmaxRow::scratch_size(common_vocab(params)))),
        terms_(blocks_) {}

  // `for_blocks(n, body)` calls body(begin, end) on ranges that cover [0, n), in this thread or in
  // several.
  template <class ForBlocks>
  void run(int64_t row, const ForBlocks& for_blocks) {
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        student_.compute_block(row, block);
        teacher_.compute_block(row, block);
      }
    });
    student_.merge();
    teacher_.merge();
    // Computed now because the gradient may overwrite the student's logits.
    const bool agree =
        params_.row_results != nullptr && student_.argmax(row) == teacher_.argmax(row);

    const TermScalars scalars{1.0f / params_.temperature, static_cast<float>(student_.max()),
                              static_cast<float>(teacher_.max()),
                              static_cast<float>(student_.log_sum() - teacher_.log_sum()),
                              gradient_bound(params_, row) * *params_.grad_scale};
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        terms_[block] = block_terms(row, block, scalars);
      }
    });
    WideLanes sum;
    for (const Lanes& block : terms_) sum.add(block);
    kl_[row] = sum.total();
    zero_gradient(params_, row, common_vocab(params_), false);
    if (params_.row_results != nullptr) write_results(row, agree ? 1.0f : 0.0f);
  }

 private:
  SoftmaxRow softmax_row(const Logits& logits, float* scratch) const {
    return {
        logits, common_vocab(params_), params_.temperature, params_.row_results != nullptr, narrow_,
        scratch};
  }

  Lanes block_terms(int64_t row, int64_t block, const TermScalars& scalars) {
    alignas(64) float student_y[kRowBlock];
    alignas(64) float teacher_y[kRowBlock];
    alignas(64) float slope[kRowBlock];
    alignas(64) float grad[kRowBlock];
    const int64_t n = student_.block_size(block);
    const Side teacher{teacher_.load(row, block, teacher_y, slope), teacher_.exps(block),
                       teacher_.factor(block)};
    const Side student{
        student_.load(row, block, student_y, slope),  // only the student's slope is needed
        student_.exps(block), student_.factor(block)};
    const DType dtype = params_.student.dtype;
    void* target =
        params_.grad == nullptr
            ? grad
            : offset(params_.grad, row * params_.grad_row_stride + block * kRowBlock, dtype);
    if (narrow_) return bfloat16_terms(student, teacher, n, scalars, target);
    float* values = dtype == DType::kFloat32 ? static_cast<float*>(target) : grad;
    const Lanes sum = float32_terms(student, teacher, n, scalars, values);
    if (params_.grad == nullptr) return sum;
    if (params_.student.softcap != 0.0f) multiply(values, slope, n);
    if (values != target) store_floats(values, n, dtype, target);
    return sum;
  }

  void write_results(int64_t row, float agreement) {
    float* result = params_.row_results + row;
    result[0] = static_cast<float>(kl_[row]);
    result[params_.rows] = static_cast<float>(student_.entropy());
    result[2 * params_.rows] = static_cast<float>(teacher_.entropy());
    result[3 * params_.rows] = std::isnan(result[0]) ? result[0] : agreement;
  }

  const DualKLParams& params_;
  double* kl_;
  int64_t blocks_;
  bool narrow_;  // both models' logits are read as bfloat16, without a float32 copy
  Scratch scratch_;
  SoftmaxRow student_;
  SoftmaxRow teacher_;
  std::vector<Lanes> terms_;
};

// Returns the power of two that scales the largest possible entry of a float16 gradient, at
// |p_s - p_t| = 1, into (2^14, 2^15]: below overflow and as far from underflow as possible.
float float16_gradient_scale(const DualKLParams& params, const std::vector<int64_t>& live) {
  if (params.grad == nullptr || params.student.dtype != DType::kFloat16) return 1.0f;
  float largest = 0.0f;
  for (const int64_t row : live) {
    largest = std::max(largest, std::fabs(gradient_bound(params, row)));
  }
  if (largest == 0.0f || !std::isfinite(largest)) return 1.0f;
  const int exponent = 15 - static_cast<int>(std::ceil(std::log2(largest)));
  return std::ldexp(1.0f, std::clamp(exponent, -126, 126));
}

}  // namespace

void dual_kl(const DualKLParams& params, const Threads& threads) {
  std::vector<int64_t> live;
  std::vector<int64_t> dropped;
  for (int64_t row = 0; row < params.rows; ++row) {
    (params.row_weight[row] != 0.0f ? live : dropped).push_back(row);
  }
  *params.grad_scale = float16_gradient_scale(params, live);
  std::vector<double> kl(params.rows, 0.0);

  // Rows that divide evenly among the threads are computed by one thread each. The threads share
  // the blocks of each remaining row. Both paths do the same arithmetic in the same order.
  const auto rows = static_cast<int64_t>(live.size());
  const int64_t blocks = SoftmaxRow::block_count(common_vocab(params));
  constexpr int64_t kWorthwhile = 2 * kRowBlock;  // elements; fewer do not repay waking a thread
  const bool share = blocks * kRowBlock >= 2 * kWorthwhile;
  const int64_t whole = share ? rows - rows % threads.count : rows;
  const int64_t grain = std::max<int64_t>(1, kWorthwhile / common_vocab(params));
  threads.for_ranges(whole, grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    RowKernel kernel(params, kl.data());
    const auto here = [](int64_t n, const auto& body) { body(0, n); };
    for (int64_t i = begin; i < end; ++i) kernel.run(live[i], here);
  });
  if (whole < rows) {
    const FlushSubnormals flush;
    RowKernel kernel(params, kl.data());
    const auto on_threads = [&](int64_t n, const auto& body) {
      threads.for_ranges(n, kWorthwhile / kRowBlock, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush_here;
        body(begin, end);
      });
    };
    for (int64_t i = whole; i < rows; ++i) kernel.run(live[i], on_threads);
  }
  const auto skipped = static_cast<int64_t>(dropped.size());
  constexpr int64_t kUncached = int64_t{1} << 25;  // bytes, more than a core's share of most caches
  const bool uncached = skipped * params.student.vocab * size_of(params.student.dtype) >= kUncached;
  threads.for_ranges(skipped, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) skip_row(params, dropped[i], uncached);
  });

  double loss = 0.0;
  for (const int64_t row : live) loss += static_cast<double>(params.row_weight[row]) * kl[row];
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
}

}  // namespace leaf::cpu
