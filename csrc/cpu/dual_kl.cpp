// loss = T^2 sum_i w_i D(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum, d = sum_v exp((y - m) / T) and p = exp((y - m) / T) / d:
//
//     l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
//     KL   = sum_v p_s - p_t + p_t l
//     grad = w T (p_s - p_t) dy_s/dz_s
//
// If l is small, p_s - p_t = p_t (phi - l) and the term of the sum is p_t phi. The series of
// phi = exp(-l) - 1 + l >= 0 avoids cancellation, and an error of d enters squared. The maxima are
// subtracted first, so that an offset between the two models does not cost accuracy. The other
// divergences are in divergence.h.
//
// There are two phases, each block by block: the softmax of both models, then the terms of loss and
// gradient. The gradient of a divergence other than KL(p_t, p_s) is a third one. The row pair stays
// in the second-level cache between them. Blocks are merged in a fixed order, so that results do
// not depend on the number of threads.

#include "leaf/dual_kl.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "divergence.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "softmax.h"

namespace leaf::cpu {
namespace {

LEAF_CLONES void multiply(float* __restrict__ x, const float* __restrict__ factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

int64_t common_vocab(const DualKLParams& params) {
  return std::min(params.student.vocab, params.teacher.vocab);
}

// Computes rows one after another; the buffers are reused.
class RowKernel {
 public:
  RowKernel(const DualKLParams& params, double* kl)
      : params_(params),
        kl_(kl),
        blocks_(SoftmaxRow::block_count(common_vocab(params))),
        narrow_(is_kl() && SoftmaxRow::is_narrow(params.student) &&
                SoftmaxRow::is_narrow(params.teacher)),
        scratch_(2 * SoftmaxRow::scratch_size(common_vocab(params))),
        student_(softmax_row(params.student, scratch_.data())),
        teacher_(softmax_row(params.teacher,
                             scratch_.data() + SoftmaxRow::scratch_size(common_vocab(params)))),
        sums_(blocks_) {}

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

    const RowScalars scalars{1.0f / params_.temperature,
                             static_cast<float>(student_.max()),
                             static_cast<float>(teacher_.max()),
                             static_cast<float>(student_.log_sum() - teacher_.log_sum()),
                             gradient_factor(params_, row) * *params_.grad_scale,
                             params_.beta,
                             params_.rest};
    is_kl() ? run_kl(row, scalars, for_blocks) : run_other(row, scalars, for_blocks);
    WideLanes sum;
    for (const DivergenceSums& block : sums_) sum.add(block.terms);
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

  bool is_kl() const { return params_.beta == 0.0f; }
  bool is_reverse() const { return params_.beta == 1.0f; }

  // Calls body(student, teacher, n, slope) with a block of both models and the student's slope.
  template <class Body>
  auto with_block(int64_t row, int64_t block, const Body& body) const {
    alignas(64) float student_y[kRowBlock];
    alignas(64) float teacher_y[kRowBlock];
    alignas(64) float slope[kRowBlock];
    const Side teacher{teacher_.load(row, block, teacher_y, slope), teacher_.exps(block),
                       teacher_.factor(block)};
    const Side student{
        student_.load(row, block, student_y, slope),  // only the student's slope is needed
        student_.exps(block), student_.factor(block)};
    return body(student, teacher, student_.block_size(block), slope);
  }

  void* gradient(int64_t row, int64_t block) const {
    const int64_t first = row * params_.grad_row_stride + block * kRowBlock;
    return offset(params_.grad, first, params_.student.dtype);
  }

  // Calls compute(grad) for a block's gradient in float32, and stores that times the slope.
  template <class Compute>
  auto with_gradient(void* target, const float* slope, int64_t n, const Compute& compute) const {
    alignas(64) float grad[kRowBlock];
    const DType dtype = params_.student.dtype;
    float* values = dtype == DType::kFloat32 ? static_cast<float*>(target) : grad;
    const auto result = compute(values);
    if (params_.student.softcap != 0.0f) multiply(values, slope, n);
    if (values != target) store_floats(values, n, dtype, target);
    return result;
  }

  // KL(p_t, p_s): returns its terms and writes the gradient in the same pass.
  Lanes kl_block(int64_t row, int64_t block, const RowScalars& scalars) const {
    return with_block(
        row, block, [&](const Side& student, const Side& teacher, int64_t n, const float* slope) {
          if (params_.grad == nullptr) {
            alignas(64) float unused[kRowBlock];
            return (narrow_ ? bfloat16_kl : float32_kl)(student, teacher, n, scalars, unused);
          }
          void* target = gradient(row, block);
          if (narrow_) return bfloat16_kl(student, teacher, n, scalars, target);
          return with_gradient(target, slope, n, [&](float* grad) {
            return float32_kl(student, teacher, n, scalars, grad);
          });
        });
  }

  template <class ForBlocks>
  void run_kl(int64_t row, const RowScalars& scalars, const ForBlocks& for_blocks) {
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        sums_[block].terms = kl_block(row, block, scalars);
      }
    });
  }

  // The other divergences: the sums over the row come before its gradient.
  template <class ForBlocks>
  void run_other(int64_t row, RowScalars scalars, const ForBlocks& for_blocks) {
    const auto sums = is_reverse() ? reverse_kl_sums : jensen_shannon_sums;
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        sums_[block] = with_block(
            row, block, [&](const Side& student, const Side& teacher, int64_t n, const float*) {
              return sums(student, teacher, n, scalars);
            });
      }
    });
    if (params_.grad == nullptr) return;
    WideLanes ratio;
    WideLanes mass;
    for (const DivergenceSums& block : sums_) {
      ratio.add(block.ratio);
      mass.add(block.mass);
    }
    scalars.mean = static_cast<float>(ratio.total() / mass.total());
    const auto compute = is_reverse() ? reverse_kl_gradient : jensen_shannon_gradient;
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        with_block(row, block,
                   [&](const Side& student, const Side& teacher, int64_t n, const float* slope) {
                     with_gradient(gradient(row, block), slope, n, [&](float* grad) {
                       compute(student, teacher, n, scalars, grad);
                       return 0;
                     });
                   });
      }
    });
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
  std::vector<DivergenceSums> sums_;
};

}  // namespace

void dual_kl(const DualKLParams& params, const Threads& threads) {
  run_rows<RowKernel>(params, common_vocab(params), threads);
}

}  // namespace leaf::cpu
