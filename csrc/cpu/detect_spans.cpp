// Per sequence, over the tokens of the domain and in float32, step by step:
//
//     s_hat = (s - min s) / (max s - min s)       for teacher and student; 0 where max = min
//     gap   = s_hat_teacher - s_hat_student
//     score = (gap - min gap) / (max gap - min gap)
//     confounder = prunable & (score <= cut) & (s_hat_teacher <= teacher_max)
//
// Each value is rounded once a step, so that masks are equal to those of any other implementation
// of the same steps. A span is a maximal run of confounders.

#include "leaf/detect_spans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace leaf::cpu {
namespace {

// Below this range of the gap, rounding decides which token is lowest: no evidence, so no span.
constexpr float kSmallestGapRange = 1e-6f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Range {
  float min;
  float max;
};

// Over the domain; +inf, -inf where it is empty. NaN does not show in it.
LEAF_CLONES Range domain_range(const float* __restrict__ x, const bool* __restrict__ domain,
                               int64_t n) {
  float min = kInfinity;
  float max = -kInfinity;
#pragma omp simd reduction(min : min) reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const float low = domain[i] ? x[i] : kInfinity;
    const float high = domain[i] ? x[i] : -kInfinity;
    min = low < min ? low : min;
    max = high > max ? high : max;
  }
  return {min, max};
}

LEAF_CLONES bool all_finite(const float* __restrict__ x, const bool* __restrict__ domain,
                            int64_t n) {
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = x[i] - x[i] == 0.0f;
    bad |= domain[i] ? (finite ? 0 : 1) : 0;
  }
  return bad == 0;
}

// Outside the domain the value is arbitrary. x and y may be the same.
LEAF_CLONES void normalize(const float* x, int64_t n, Range range, float* y) {
  const float width = range.max - range.min;
  if (!(width > 0.0f)) {
    std::fill(y, y + n, 0.0f);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - range.min) / width;
}

class Sequence {
 public:
  Sequence(const DetectSpansParams& params, int64_t index)
      : p_(params),
        index_(index),
        begin_(params.offsets[index]),
        n_(params.offsets[index + 1] - params.offsets[index]),
        domain_(params.domain + begin_),
        score_(params.score + begin_),
        confounder_(params.confounder + begin_) {}

  void run() {
    p_.status[index_] = 0;
    if (!all_finite(p_.teacher + begin_, domain_, n_)) p_.status[index_] |= kTeacherNotFinite;
    if (!all_finite(p_.student + begin_, domain_, n_)) p_.status[index_] |= kStudentNotFinite;
    std::fill(confounder_, confounder_ + n_, false);
    if (p_.status[index_] == 0) {
      mark();
    } else {
      std::fill(score_, score_ + n_, kNaN);
    }
    write_spans();
  }

 private:
  void mark() {
    std::vector<float> teacher(n_);
    std::vector<float> student(n_);
    const float* raw_teacher = p_.teacher + begin_;
    const float* raw_student = p_.student + begin_;
    normalize(raw_teacher, n_, domain_range(raw_teacher, domain_, n_), teacher.data());
    normalize(raw_student, n_, domain_range(raw_student, domain_, n_), student.data());
    for (int64_t i = 0; i < n_; ++i) score_[i] = teacher[i] - student[i];
    const Range gap = domain_range(score_, domain_, n_);
    normalize(score_, n_, gap, score_);
    for (int64_t i = 0; i < n_; ++i) score_[i] = domain_[i] ? score_[i] : kNaN;

    if (!(gap.max - gap.min >= kSmallestGapRange)) return;
    const float cut = p_.quantile ? quantile_cut() : static_cast<float>(p_.threshold);
    const float teacher_max = static_cast<float>(p_.teacher_max);
    const bool* prunable = p_.prunable == nullptr ? domain_ : p_.prunable + begin_;
    for (int64_t i = 0; i < n_; ++i) {  // a NaN score is below no cut
      confounder_[i] = prunable[i] && score_[i] <= cut && teacher[i] <= teacher_max;
    }
  }

  // min(cap, score of rank floor(threshold n) among the n tokens of the domain).
  float quantile_cut() const {
    std::vector<float> sorted;
    sorted.reserve(n_);
    for (int64_t i = 0; i < n_; ++i) {
      if (domain_[i]) sorted.push_back(score_[i]);
    }
    const auto n = static_cast<int64_t>(sorted.size());
    const auto rank = static_cast<int64_t>(std::floor(p_.threshold * static_cast<double>(n)));
    const auto nth = sorted.begin() + std::clamp<int64_t>(rank, 0, n - 1);
    std::nth_element(sorted.begin(), nth, sorted.end());
    return std::min(static_cast<float>(p_.cap), *nth);
  }

  // Runs of confounders, those joined that at most join_gap domain tokens separate.
  void write_spans() {
    int64_t* span = p_.span + index_ * p_.max_spans * 2;
    std::fill(span, span + p_.max_spans * 2, int64_t{-1});
    int64_t count = 0;
    int64_t start = -1;  // of the open run, -1: none
    int64_t stop = -1;
    const auto close = [&] {
      if (start >= 0 && stop - start >= p_.min_length) {
        span[2 * count] = start;
        span[2 * count + 1] = stop;
        ++count;
      }
      start = -1;
    };
    for (int64_t i = 0; i < n_; ++i) {
      if (confounder_[i]) {
        start = start < 0 ? i : start;
        stop = i + 1;
      } else if (start >= 0 && (!domain_[i] || i - stop >= p_.join_gap)) {
        close();
      }
    }
    close();
    p_.count[index_] = count;
  }

  const DetectSpansParams& p_;
  int64_t index_;
  int64_t begin_;
  int64_t n_;
  const bool* domain_;
  float* score_;
  bool* confounder_;
};

}  // namespace

void detect_spans(const DetectSpansParams& params, const Threads& threads) {
  // Tokens before the first and after the last sequence belong to none.
  const int64_t first = params.sequences > 0 ? params.offsets[0] : 0;
  const int64_t last = params.sequences > 0 ? params.offsets[params.sequences] : 0;
  std::fill(params.score, params.score + first, kNaN);
  std::fill(params.score + last, params.score + params.tokens, kNaN);
  std::fill(params.confounder, params.confounder + first, false);
  std::fill(params.confounder + last, params.confounder + params.tokens, false);

  const int64_t mean_length = params.tokens / std::max<int64_t>(1, params.sequences);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, mean_length));
  threads.for_ranges(params.sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) Sequence(params, i).run();
  });
}

}  // namespace leaf::cpu
