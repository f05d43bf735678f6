// Per sequence, over the tokens of the domain and in float32, step by step:
//
//     s_hat = (s - min s) / (max s - min s)       for teacher and student; 0 where max = min
//     gap   = s_hat_teacher - weight s_hat_student
//     score = (gap - min gap) / (max gap - min gap)
//     confounder = prunable & (score <= cut) & (s_hat_teacher <= teacher_max)
//
// Every step rounds each value once, so that the masks equal those of every other backend. A span
// is a maximal run of confounders.
//
// On the logarithmic scale the gap is log t - weight log s of the models' shares t and s of their
// largest norm, at least kLogFloor. From a weight of 1/2 on it is log(t / s) - (weight - 1) log s,
// so that weights of 1 and 0 make no error in a gap that is equal everywhere. Here backends differ
// by the rounding of logarithms.

#include "leaf/detect_spans.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace leaf::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Range {
  float min;
  float max;
  bool finite;

  float width() const { return max - min; }
};

// Returns min and max over the domain, (+inf, -inf) if it is empty. NaN values are ignored.
LEAF_CLONES Range domain_range(const float* __restrict__ x, const uint8_t* __restrict__ domain,
                               int64_t n) {
  float min = kInfinity;
  float max = -kInfinity;
  int32_t bad = 0;
#pragma omp simd reduction(min : min) reduction(max : max) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i];
    const int32_t inside = domain[i];
    const float low = inside != 0 ? value : kInfinity;
    const float high = inside != 0 ? value : -kInfinity;
    min = low < min ? low : min;
    max = high > max ? high : max;
    const int32_t not_finite = value - value == 0.0f ? 0 : inside;
    bad |= not_finite;
  }
  return {min, max, bad == 0};
}

// Returns weight * (x - min) / (max - min) in y, which may be x. Values outside the domain are
// arbitrary. The weight is not left to the subtraction, where it would be fused on some processors.
LEAF_CLONES void normalize(const float* x, int64_t n, Range range, float weight, float* y) {
  const float width = range.max - range.min;
  if (!(width > 0.0f)) {
    std::fill(y, y + n, 0.0f);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = weight * ((x[i] - range.min) / width);
}

// Divides by the largest value in the domain: shares in [kLogFloor, 1], also outside the domain.
LEAF_CLONES void share(const float* __restrict__ x, int64_t n, float max, float* __restrict__ y) {
  if (!(max > 0.0f)) {
    std::fill(y, y + n, 1.0f);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float ratio = x[i] / max;
    const float bounded = ratio < 1.0f ? ratio : 1.0f;
    y[i] = bounded > kLogFloor ? bounded : kLogFloor;
  }
}

LEAF_CLONES void divide(float* __restrict__ x, const float* __restrict__ y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] /= y[i];
}

// Returns log x - weight log y.
LEAF_CLONES void subtract_logs(const float* __restrict__ x, const float* __restrict__ y, int64_t n,
                               float weight, float* __restrict__ difference) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i];
    const float b = y[i];
    difference[i] = log_of(a, a - 1.0f) - weight * log_of(b, b - 1.0f);
  }
}

LEAF_CLONES void subtract(const float* __restrict__ x, const float* __restrict__ y, int64_t n,
                          float* __restrict__ difference) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) difference[i] = x[i] - y[i];
}

LEAF_CLONES void erase_outside(const uint8_t* __restrict__ domain, int64_t n,
                               float* __restrict__ x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i];
    x[i] = domain[i] != 0 ? value : kNaN;
  }
}

// A NaN score is never marked.
LEAF_CLONES void mark_low(const float* __restrict__ score, float cut,
                          const float* __restrict__ teacher, float teacher_max,
                          const uint8_t* __restrict__ prunable, int64_t n,
                          uint8_t* __restrict__ confounder) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t low = score[i] <= cut ? 1 : 0;
    const uint8_t bounded = teacher[i] <= teacher_max ? 1 : 0;
    const uint8_t cuttable = prunable[i] != 0 ? 1 : 0;
    confounder[i] = low & bounded & cuttable;
  }
}

// Calls visit(start, stop) for each maximal run of true, in order. Eight tokens at a time: a byte
// of `edges` is 1 where a token differs from the one before it.
template <class Visit>
void for_runs(const uint8_t* mask, int64_t n, const Visit& visit) {
  static_assert(std::endian::native == std::endian::little);
  uint64_t last = 0;
  int64_t start = -1;  // start of the open run; -1 if there is none
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t word = 0;
    if (i + 8 <= n) {
      std::memcpy(&word, mask + i, 8);
    } else {
      std::memcpy(&word, mask + i, static_cast<size_t>(n - i));
    }
    uint64_t edges = word ^ (word << 8 | last);
    last = word >> 56;
    for (; edges != 0; edges &= edges - 1) {
      const int64_t edge = i + std::countr_zero(edges) / 8;
      if (start >= 0) visit(start, edge);
      start = start < 0 ? edge : -1;
    }
  }
  if (start >= 0) visit(start, n);
}

class Sequence {
 public:
  Sequence(const DetectSpansParams& params, int64_t index)
      : p_(params),
        index_(index),
        begin_(params.border(index)),
        n_(params.border(index + 1) - begin_),
        domain_(params.domain + begin_),
        score_(params.score + begin_),
        confounder_(params.confounder + begin_) {}

  void run() {
    const Range teacher = domain_range(p_.teacher + begin_, domain_, n_);
    const Range student = domain_range(p_.student + begin_, domain_, n_);
    p_.status[index_] = 0;
    if (!teacher.finite) p_.status[index_] |= kTeacherNotFinite;
    if (!student.finite) p_.status[index_] |= kStudentNotFinite;
    std::fill(confounder_, confounder_ + n_, 0);
    if (p_.status[index_] == 0) {
      mark(teacher, student);
    } else {
      std::fill(score_, score_ + n_, kNaN);
    }
    write_spans();
  }

 private:
  void mark(const Range& teacher_range, const Range& student_range) {
    std::vector<float> teacher(n_);
    std::vector<float> student(n_);
    if (p_.scale == GapScale::kMinMax) {
      normalize(p_.teacher + begin_, n_, teacher_range, 1.0f, teacher.data());
      normalize(p_.student + begin_, n_, student_range, p_.weight, student.data());
      subtract(teacher.data(), student.data(), n_, score_);
    } else {
      share(p_.teacher + begin_, n_, teacher_range.max, teacher.data());
      share(p_.student + begin_, n_, student_range.max, student.data());
      if (p_.scale == GapScale::kLogRatio) divide(teacher.data(), student.data(), n_);
      subtract_logs(teacher.data(), student.data(), n_, p_.weight, score_);
      normalize(p_.teacher + begin_, n_, teacher_range, 1.0f, teacher.data());
    }
    const Range gap = domain_range(score_, domain_, n_);
    normalize(score_, n_, gap, 1.0f, score_);
    erase_outside(domain_, n_, score_);

    if (!(gap.width() >= kSmallestGapRange)) return;
    const float cut = p_.quantile ? quantile_cut() : static_cast<float>(p_.threshold);
    const uint8_t* prunable = p_.prunable == nullptr ? domain_ : p_.prunable + begin_;
    mark_low(score_, cut, teacher.data(), static_cast<float>(p_.teacher_max), prunable, n_,
             confounder_);
  }

  // Returns min(cap, score of rank floor(threshold n) among the n tokens of the domain).
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

  // Writes the runs of confounders; joins runs that at most join_gap domain tokens separate.
  void write_spans() {
    int64_t* span = p_.span + index_ * p_.max_spans * 2;
    int64_t count = 0;
    int64_t open_start = 0;
    int64_t open_stop = -1;  // -1: no span is open
    const auto close = [&] {
      if (open_stop < 0 || open_stop - open_start < p_.min_length) return;
      span[2 * count] = open_start;
      span[2 * count + 1] = open_stop;
      ++count;
    };
    for_runs(confounder_, n_, [&](int64_t start, int64_t stop) {
      const bool joined = open_stop >= 0 && start - open_stop <= p_.join_gap &&
                          std::count(domain_ + open_stop, domain_ + start, 0) == 0;
      if (!joined) {
        close();
        open_start = start;
      }
      open_stop = stop;
    });
    close();
    std::fill(span + 2 * count, span + 2 * p_.max_spans, int64_t{-1});
    p_.count[index_] = count;
  }

  const DetectSpansParams& p_;
  int64_t index_;
  int64_t begin_;
  int64_t n_;
  const uint8_t* domain_;
  float* score_;
  uint8_t* confounder_;
};

}  // namespace

void detect_spans(const DetectSpansParams& params, const Threads& threads) {
  // Tokens before the first and after the last sequence belong to no sequence.
  const int64_t first = params.sequences > 0 ? params.border(0) : 0;
  const int64_t last = params.sequences > 0 ? params.border(params.sequences) : 0;
  std::fill(params.score, params.score + first, kNaN);
  std::fill(params.score + last, params.score + params.tokens, kNaN);
  std::fill(params.confounder, params.confounder + first, 0);
  std::fill(params.confounder + last, params.confounder + params.tokens, 0);

  const int64_t mean_length = params.tokens / std::max<int64_t>(1, params.sequences);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, mean_length));
  threads.for_ranges(params.sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) Sequence(params, i).run();
  });
}

}  // namespace leaf::cpu
