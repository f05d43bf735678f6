#include "divergence.h"

#include <bit>

#include "pairs.h"

namespace leaf::cpu {
namespace {

// In a gradient a larger log(p_s / p_t) counts as this: it is infinite where the teacher excludes a
// token.
constexpr float kLargestRatio = 1000.0f;

// Returns exp(-l) - 1 + l by its series, for |l| < 0.5.
LEAF_INLINE float phi(float l) {
  float series = -1.0f / 5040;
  series = series * l + 1.0f / 720;
  series = series * l - 1.0f / 120;
  series = series * l + 1.0f / 24;
  series = series * l - 1.0f / 6;
  series = series * l + 1.0f / 2;
  return series * (l * l);
}

// Returns q - p and stores q - p + p l in `term`, l = log p - log q. If l is small, the term is
// p (exp(-l) - 1 + l).
LEAF_INLINE float difference_and_term(float q, float p, float log_ratio, float* term) {
  const float l =
      p == 0.0f ? 1.0f : log_ratio;  // any number but NaN, which arises if both are -inf
  const float excess = phi(l);
  const bool near = l * l < 0.25f;
  const float difference = near ? p * (excess - l) : q - p;
  *term = near ? p * excess : difference + p * l;
  return difference;
}

// Returns log(own + other e^-x), own + other = 1, from decay = e^-x and drop = e^-x - 1. Near 0 it
// has the relative error of `drop`.
LEAF_INLINE float log_of_mixture(float own, float other, float decay, float drop) {
  const float value = own + other * decay;
  return value == value ? log_of(value, other * drop) : value;
}

// A divergence whose gradient is p_s (r - mean): returns the term of a token and stores r.
struct ReverseKL {
  LEAF_INLINE float term(float ps, float pt, float l, float* r) const {
    float term;
    difference_and_term(pt, ps, -l, &term);
    *r = -l > kLargestRatio ? kLargestRatio : -l;
    return term;
  }
};

struct JensenShannon {
  float beta, rest;

  LEAF_INLINE float term(float ps, float pt, float l, float* r) const {
    const bool more = l > 0.0f;
    const float x = more ? -l : l;
    const float decay = exp2_nonpositive(x, kLog2e, -127.0f / kLog2e);
    const float drop = x > -0.5f ? phi(-x) + x : decay - 1.0f;
    const float log_m = log_of_mixture(more ? beta : rest, more ? rest : beta, decay, drop);
    const float above_teacher = more ? log_m : log_m - l;  // log(m / p_t)
    const float above_student = more ? log_m + l : log_m;
    const float m = beta * pt + rest * ps;
    float of_teacher;
    float of_student;
    difference_and_term(m, pt, -above_teacher, &of_teacher);
    difference_and_term(m, ps, -above_student, &of_student);
    *r = -rest * above_student;
    return beta * of_teacher + rest * of_student;
  }
};

// The probability, term and r of a token.
struct Token {
  float ps;
  float term;
  float r;
};

// Computes the token at `at` of a block from both models' y.
template <class Divergence>
LEAF_INLINE Token token(const Divergence& divergence, float s, float t, const Side& student,
                        const Side& teacher, const RowScalars& row, int64_t at) {
  const float apart = (t - row.max_t) - (s - row.max_s);
  const float log_ratio = apart * row.inv_temperature + row.log_ratio;
  const float ps = student.exps[at] * student.factor;
  float r;
  const float term = divergence.term(ps, teacher.exps[at] * teacher.factor, log_ratio, &r);
  return {ps, term, ps == 0.0f ? 0.0f : r};  // r may be infinite or NaN there
}

template <class Divergence>
LEAF_INLINE DivergenceSums sums(const Divergence& divergence, const Side& student,
                                const Side& teacher, int64_t n, const RowScalars& row) {
  const float* ys = static_cast<const float*>(student.y);
  const float* yt = static_cast<const float*>(teacher.y);
  alignas(64) float terms[kChains] = {};
  alignas(64) float ratio[kChains] = {};
  alignas(64) float mass[kChains] = {};
  for_stretches(n, [&](int64_t begin, int64_t width) LEAF_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float s = ys[begin + i];
      const Token here = token(divergence, s, yt[begin + i], student, teacher, row, begin + i);
      terms[i] += here.term;
      ratio[i] += here.ps * here.r;
      mass[i] += here.ps;
    }
  });
  return {fold(terms), fold(ratio), fold(mass)};
}

template <class Divergence>
LEAF_INLINE void gradient(const Divergence& divergence, const Side& student, const Side& teacher,
                          int64_t n, const RowScalars& row, float* grad) {
  const float* ys = static_cast<const float*>(student.y);
  const float* yt = static_cast<const float*>(teacher.y);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float s = ys[i];
    const Token here = token(divergence, s, yt[i], student, teacher, row, i);
    grad[i] = row.grad_scale * here.ps * (here.r - row.mean);
  }
}

template <class Element>
LEAF_INLINE Lanes kl(const Side& student, const Side& teacher, int64_t n, const RowScalars& row,
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

}  // namespace

LEAF_CLONES Lanes float32_kl(const Side student, const Side teacher, int64_t n,
                             const RowScalars row, void* grad) {
  return kl(student, teacher, n, row, static_cast<float*>(grad));
}
LEAF_CLONES Lanes bfloat16_kl(const Side student, const Side teacher, int64_t n,
                              const RowScalars row, void* grad) {
  return kl(student, teacher, n, row, static_cast<BFloat16*>(grad));
}

LEAF_CLONES DivergenceSums reverse_kl_sums(const Side student, const Side teacher, int64_t n,
                                           const RowScalars row) {
  return sums(ReverseKL{}, student, teacher, n, row);
}
LEAF_CLONES DivergenceSums jensen_shannon_sums(const Side student, const Side teacher, int64_t n,
                                               const RowScalars row) {
  return sums(JensenShannon{row.beta, row.rest}, student, teacher, n, row);
}
LEAF_CLONES void reverse_kl_gradient(const Side student, const Side teacher, int64_t n,
                                     const RowScalars row, float* grad) {
  gradient(ReverseKL{}, student, teacher, n, row, grad);
}
LEAF_CLONES void jensen_shannon_gradient(const Side student, const Side teacher, int64_t n,
                                         const RowScalars row, float* grad) {
  gradient(JensenShannon{row.beta, row.rest}, student, teacher, n, row, grad);
}

}  // namespace leaf::cpu
