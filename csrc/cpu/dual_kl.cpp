// loss = T^2 sum_i w_i KL(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum, d = sum_v exp((y - m) / T) and p = exp((y - m) / T) / d:
//
//     l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
//     KL   = sum_v p_s - p_t + p_t l
//     grad = w T (p_s - p_t) dy_s/dz_s
//
// Where l is small, p_s - p_t = p_t (phi - l) and the term of the sum is p_t phi, with
// phi = exp(-l) - 1 + l >= 0 by its series, so that nothing cancels and an error of d enters
// squared. The maxima are subtracted first, so that an offset between the two models costs nothing.
//
// Two phases, each over blocks that fit the first-level cache: the softmax of both models, then the
// terms of loss and gradient. Between them the row pair stays in the second-level cache. Blocks are
// merged in their order, whoever computed them, so that results do not depend on the threads.

#include "leaf/dual_kl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.h"
#include "simd.h"
#include "softmax.h"

namespace leaf::cpu {
namespace {

struct TermScalars {
  float inv_temperature;
  float max_s, max_t;
  float log_ratio;  // log d_s - log d_t
  float grad_scale;
};

// One model's block: p = exps * factor.
struct Side {
  const float* y;
  const float* exps;
  float factor;
};

// p_s - p_t, and p_s - p_t + p_t l in `term`.
LEAF_INLINE float difference_and_term(float ps, float pt, float log_ratio, float* term) {
  const float l = pt == 0.0f ? 1.0f : log_ratio;  // it only must not be NaN, as where both are -inf
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
LEAF_CLONES Lanes terms(const Side student, const Side teacher, int64_t n, const TermScalars row,
                        float* grad) {
  alignas(64) float sum[kChains] = {};
  for_stretches(n, [&](int64_t begin, int64_t width) LEAF_INLINE_LAMBDA {
    const float* ys = student.y + begin;
    const float* yt = teacher.y + begin;
    const float* es = student.exps + begin;
    const float* et = teacher.exps + begin;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float apart = (yt[i] - row.max_t) - (ys[i] - row.max_s);
      const float log_ratio = apart * row.inv_temperature + row.log_ratio;
      float term;
      grad[begin + i] =
          row.grad_scale *
          difference_and_term(es[i] * student.factor, et[i] * teacher.factor, log_ratio, &term);
      sum[i] += term;
    }
  });
  return fold(sum);
}

LEAF_CLONES void multiply(float* __restrict__ x, const float* __restrict__ factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

int64_t common_vocab(const DualKLParams& params) {
  return std::min(params.student.vocab, params.teacher.vocab);
}

// The factor of p_s - p_t in a row's gradient, the chain factor of the softcap apart.
float gradient_bound(const DualKLParams& params, int64_t row) {
  return params.row_weight[row] * params.temperature * params.student.scale;
}

// Zeroes a row's gradient from element `begin` on.
void zero_gradient(const DualKLParams& params, int64_t row, int64_t begin) {
  if (params.grad == nullptr) return;
  const DType dtype = params.student.dtype;
  std::memset(offset(params.grad, row * params.grad_row_stride + begin, dtype), 0,
              static_cast<size_t>((params.student.vocab - begin) * size_of(dtype)));
}

// Computes rows one after another; the buffers are reused.
class RowKernel {
 public:
  RowKernel(const DualKLParams& params, double* kl)
      : params_(params),
        kl_(kl),
        blocks_(SoftmaxRow::block_count(common_vocab(params))),
        student_(params.student, common_vocab(params), params.temperature,
                 params.row_results != nullptr),
        teacher_(params.teacher, common_vocab(params), params.temperature,
                 params.row_results != nullptr),
        terms_(blocks_) {}

  // `for_blocks(n, body)` calls body(begin, end) on ranges that cover [0, n): here or on threads.
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
    // Now, as the gradient may overwrite the student.
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
    zero_gradient(params_, row, common_vocab(params_));
    if (params_.row_results != nullptr) write_results(row, agree ? 1.0f : 0.0f);
  }

 private:
  Lanes block_terms(int64_t row, int64_t block, const TermScalars& scalars) {
    alignas(64) float student_y[kBlock];
    alignas(64) float teacher_y[kBlock];
    alignas(64) float slope[kBlock];
    alignas(64) float grad[kBlock];
    const int64_t n = student_.block_size(block);
    const float* yt = teacher_.load(row, block, teacher_y, slope);
    const float* ys = student_.load(row, block, student_y, slope);  // its slope is the one needed
    const DType dtype = params_.student.dtype;
    void* target =
        params_.grad == nullptr
            ? grad
            : offset(params_.grad, row * params_.grad_row_stride + block * kBlock, dtype);
    float* values = dtype == DType::kFloat32 ? static_cast<float*>(target) : grad;
    const Lanes sum = terms({ys, student_.exps(block), student_.factor(block)},
                            {yt, teacher_.exps(block), teacher_.factor(block)}, n, scalars, values);
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
  SoftmaxRow student_;
  SoftmaxRow teacher_;
  std::vector<Lanes> terms_;
};

void skip_row(const DualKLParams& params, int64_t row) {
  zero_gradient(params, row, 0);
  if (params.row_results == nullptr) return;
  for (int64_t i = 0; i < 4; ++i) params.row_results[i * params.rows + row] = 0.0f;
}

// The power of two that brings the largest possible entry of a float16 gradient, |p_s - p_t| being
// at most 1, into (2^14, 2^15]: below its overflow, and as far from its underflow as can be.
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

  // As many rows as the threads can share evenly are computed by one thread each; the blocks of
  // each row that is left over are shared. Both ways do the same arithmetic in the same order.
  const auto rows = static_cast<int64_t>(live.size());
  const int64_t blocks = SoftmaxRow::block_count(common_vocab(params));
  constexpr int64_t kBlocksPerThread = 8;  // less is not worth waking one
  const bool share = blocks >= 2 * kBlocksPerThread;
  const int64_t whole = share ? rows - rows % threads.count : rows;
  const int64_t grain = std::max<int64_t>(1, kBlocksPerThread / blocks);
  threads.for_ranges(whole, grain, [&](int64_t begin, int64_t end) {
    RowKernel kernel(params, kl.data());
    const auto here = [](int64_t n, const auto& body) { body(0, n); };
    for (int64_t i = begin; i < end; ++i) kernel.run(live[i], here);
  });
  if (whole < rows) {
    RowKernel kernel(params, kl.data());
    const auto on_threads = [&](int64_t n, const auto& body) {
      threads.for_ranges(n, kBlocksPerThread, body);
    };
    for (int64_t i = whole; i < rows; ++i) kernel.run(live[i], on_threads);
  }
  threads.for_ranges(static_cast<int64_t>(dropped.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) skip_row(params, dropped[i]);
  });

  double loss = 0.0;
  for (const int64_t row : live) loss += static_cast<double>(params.row_weight[row]) * kl[row];
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
}

}  // namespace leaf::cpu
