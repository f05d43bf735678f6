// loss = T^2 sum_i w_i KL(p_t, p_s) over k + 1 outcomes, the k ids of a row and all others
// together, and its gradient. With the logits' softmax split at the ids, p_s = q times the mass of
// the ids or u times a softmax over the others:
//
//     KL   = sum_j q_j - p_j + p_j log(p_j / q_j)  +  u - t + t log(t / u)
//     grad = w T (q_j - p_j) dy/dz on the ids, w T (u - t) softmax_v dy/dz on the others
//
// Two softmaxes of a row, one over the ids and one over the others, are put together in logarithms.
// The mass of the others is therefore a sum of their own powers, never a difference to 1, and
// t / u is right also where u is too small for float32. A third softmax is the teacher's.
//
// The row is read once: its powers, which are 0 at the ids, are all that the gradient needs.

#include "leaf/topk_kl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "softmax.h"

namespace leaf::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNothing = -kInfinity;

LEAF_CLONES void scale_powers(const float* __restrict__ exps, int64_t n, float factor,
                              float* __restrict__ grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] = exps[i] * factor;
}

LEAF_CLONES void multiply(float* __restrict__ x, const float* __restrict__ factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

double log_add(double a, double b) {
  if (a == kNothing) return b;
  if (b == kNothing) return a;
  const double most = a < b ? b : a;
  return most + std::log(std::exp(a - most) + std::exp(b - most));
}

// The k + 1 outcomes of one model, given the softmax over its ids.
struct Outcomes {
  double log_listed;  // the ids' share of the probability
  double log_rest;
  double base;  // log p of an id is (y - base) / T + shift
  double shift;
  double factor;  // p of an id is its power times factor

  Outcomes(const SoftmaxRow& ids, double log_rest_sum, double temperature) {
    const bool empty = ids.log_sum() == kNothing;
    const double log_ids = empty ? kNothing : ids.max() / temperature + ids.log_sum();
    const double total = log_add(log_ids, log_rest_sum);
    log_listed = log_ids - total;
    log_rest = log_rest_sum - total;
    base = empty ? 0.0 : ids.max();
    shift = empty ? 0.0 : log_listed - ids.log_sum();
    factor = empty ? 0.0 : ids.factor(0) * std::exp(log_listed);
  }

  // The entropy, given those within the ids and within the rest.
  double entropy(double of_ids, double of_rest) const {
    const auto part = [](double log_p, double inner) {
      return log_p == kNothing ? 0.0 : std::exp(log_p) * (inner - log_p);
    };
    return part(log_listed, of_ids) + part(log_rest, of_rest);
  }
};

// Returns p_s - p_t and adds p_s - p_t + p_t l to the sum, with l = log p_t - log p_s.
double add_term(double p_s, double p_t, double l, double* sum) {
  if (p_t == 0.0) {
    *sum += p_s;
    return p_s;
  }
  if (std::fabs(l) < 0.5) {
    const double difference = p_t * std::expm1(-l);
    *sum += difference + p_t * l;
    return difference;
  }
  *sum += p_s - p_t + p_t * l;
  return p_s - p_t;
}

class RowKernel {
 public:
  RowKernel(const TopkKLParams& params, double* kl)
      : params_(params),
        kl_(kl),
        blocks_(SoftmaxRow::block_count(params.student.vocab)),
        scratch_(SoftmaxRow::scratch_size(params.student.vocab) + 2 * kRowBlock),
        first_(blocks_ + 1),
        columns_(params.k),
        z_(params.k),
        y_(params.k),
        slope_(params.k, 1.0f),
        logprob_(params.k),
        gradient_(params.k),
        others_(params.student, params.student.vocab, params.temperature, measures(), false,
                scratch_.data() + 2 * kRowBlock),
        listed_(plain(y_), params.k, params.temperature, measures(), false, scratch_.data()),
        teacher_(plain(logprob_), params.k, 1.0f, measures(), false, scratch_.data() + kRowBlock) {}

  template <class ForBlocks>
  void run(int64_t row, const ForBlocks& for_blocks) {
    list_ids(row);
    others_.exclude(first_.data(), columns_.data());
    for_blocks(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) others_.compute_block(row, block);
    });
    others_.merge();
    compute_ids(row);
    const double temperature = params_.temperature;
    const bool none = others_.log_sum() == kNothing;
    const Outcomes student(
        listed_, none ? kNothing : others_.max() / temperature + others_.log_sum(), temperature);
    const Outcomes teacher(teacher_, params_.tail[row], 1.0);
    // Computed now because the gradient may overwrite the logits.
    const bool agree = measures() && agrees(row);

    double kl = 0.0;
    const double scale = gradient_factor(params_, row) * *params_.grad_scale;
    for (int64_t i = 0; i < count_; ++i) {
      const double l = (logprob_[i] - teacher.base) + teacher.shift -
                       (y_[i] - student.base) / temperature - student.shift;
      const double difference = add_term(listed_.exps(0)[i] * student.factor,
                                         teacher_.exps(0)[i] * teacher.factor, l, &kl);
      gradient_[i] = static_cast<float>(scale * difference) * slope_[i];
    }
    const double difference = add_term(std::exp(student.log_rest), std::exp(teacher.log_rest),
                                       teacher.log_rest - student.log_rest, &kl);
    kl_[row] = kl;
    if (params_.grad != nullptr) {
      const auto factor = static_cast<float>(none ? 0.0 : scale * difference);
      for_blocks(blocks_, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) write_others(row, block, factor);
      });
      write_ids(row);
    }
    if (measures()) write_results(row, student, teacher, agree);
  }

 private:
  bool measures() const { return params_.row_results != nullptr; }

  static Logits plain(const std::vector<float>& values) {
    return {values.data(), DType::kFloat32, 0, static_cast<int64_t>(values.size()), 1.0f, 0.0f};
  }

  // Sorts the row's ids by block: `columns_` has the ids of block b at [first_[b], first_[b + 1]).
  // An id that the vocabulary lacks is left out.
  void list_ids(int64_t row) {
    const int64_t* ids = params_.ids + row * params_.k;
    const float* logprobs = params_.logprobs + row * params_.k;
    const auto inside = [&](int64_t id) { return id >= 0 && id < params_.student.vocab; };
    std::fill(first_.begin(), first_.end(), 0);
    for (int64_t i = 0; i < params_.k; ++i) {
      if (inside(ids[i])) ++first_[ids[i] / kRowBlock + 1];
    }
    for (int64_t block = 0; block < blocks_; ++block) first_[block + 1] += first_[block];
    count_ = first_[blocks_];
    next_ = first_;
    for (int64_t i = 0; i < params_.k; ++i) {
      if (!inside(ids[i])) continue;
      const int32_t at = next_[ids[i] / kRowBlock]++;
      columns_[at] = static_cast<int32_t>(ids[i]);
      logprob_[at] = logprobs[i];
    }
    std::fill(logprob_.begin() + count_, logprob_.end(), -kInfinity);
  }

  // Computes the softmaxes over the ids.
  void compute_ids(int64_t row) {
    const Logits& logits = params_.student;
    for (int64_t i = 0; i < count_; ++i) {
      const void* z = offset(logits.data, row * logits.row_stride + columns_[i], logits.dtype);
      z_[i] = *load_floats(z, logits.dtype, 1, &z_[i]);
    }
    const float* y = activate(logits, z_.data(), count_, y_.data(), slope_.data());
    if (y != y_.data()) std::copy(y, y + count_, y_.data());
    std::fill(y_.begin() + count_, y_.end(), -kInfinity);
    for (SoftmaxRow* softmax : {&listed_, &teacher_}) {
      softmax->compute_block(0, 0);
      softmax->merge();
    }
  }

  // Whether the student's largest logit is at the teacher's id of the largest log-probability; the
  // lowest of equal ones.
  bool agrees(int64_t row) const {
    SoftmaxRow::Largest student = others_.largest(row);
    SoftmaxRow::Largest teacher{-kInfinity, params_.student.vocab};
    for (int64_t i = 0; i < count_; ++i) {
      student.add({z_[i], columns_[i]});
      teacher.add({logprob_[i], columns_[i]});
    }
    return student.index == teacher.index;
  }

  // Writes factor * p / u, with the slope of a softcap, to a block of the gradient.
  void write_others(int64_t row, int64_t block, float factor) {
    alignas(64) float buffer[kRowBlock];
    alignas(64) float slope[kRowBlock];
    const DType dtype = params_.student.dtype;
    const int64_t n = others_.block_size(block);
    void* target = offset(params_.grad, row * params_.grad_row_stride + block * kRowBlock, dtype);
    const bool capped = params_.student.softcap != 0.0f;
    if (capped) others_.load(row, block, buffer, slope);
    float* values = dtype == DType::kFloat32 ? static_cast<float*>(target) : buffer;
    // A row without others has a factor of 0, and no factor of its own.
    scale_powers(others_.exps(block), n, factor == 0.0f ? 0.0f : others_.factor(block) * factor,
                 values);
    if (capped) multiply(values, slope, n);
    if (values != target) store_floats(values, n, dtype, target);
  }

  void write_ids(int64_t row) {
    const DType dtype = params_.student.dtype;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t at = row * params_.grad_row_stride + columns_[i];
      store_floats(&gradient_[i], 1, dtype, offset(params_.grad, at, dtype));
    }
  }

  void write_results(int64_t row, const Outcomes& student, const Outcomes& teacher, bool agree) {
    float* result = params_.row_results + row;
    result[0] = static_cast<float>(kl_[row]);
    result[params_.rows] =
        static_cast<float>(student.entropy(listed_.entropy(), others_.entropy()));
    result[2 * params_.rows] = static_cast<float>(teacher.entropy(teacher_.entropy(), 0.0));
    result[3 * params_.rows] = std::isnan(result[0]) ? result[0] : agree ? 1.0f : 0.0f;
  }

  const TopkKLParams& params_;
  double* kl_;
  int64_t blocks_;
  int64_t count_ = 0;  // ids of the row
  Scratch scratch_;
  std::vector<int32_t> first_;    // [blocks + 1]
  std::vector<int32_t> next_;     // [blocks + 1]
  std::vector<int32_t> columns_;  // [k], as what follows
  std::vector<float> z_;
  std::vector<float> y_;
  std::vector<float> slope_;  // dy/d(scale z)
  std::vector<float> logprob_;
  std::vector<float> gradient_;
  SoftmaxRow others_;  // of the student over all other ids
  SoftmaxRow listed_;  // of the student over the ids
  SoftmaxRow teacher_;
};

}  // namespace

void topk_kl(const TopkKLParams& params, const Threads& threads) {
  run_rows<RowKernel>(params, params.student.vocab, threads);
}

}  // namespace leaf::cpu
