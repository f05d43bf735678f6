#pragma once

// The terms of a pair of logits in the sums of a row, from the probabilities and their logarithms
// to base 2.

#include "device.cuh"
#include "leaf/dual_kl.h"
#include "softmax.cuh"

namespace leaf::cuda {

// The sums over a row, by a thread in float32: the divergence (`kl`) in nats, and for both models
// the sum of 2^power * power, the student's not yet divided by its total. The logarithms of the
// totals turn these into entropies.
template <class T>
struct Sums {
  T kl = 0;
  T student_power = 0;
  T teacher_power = 0;

  __device__ __forceinline__ void add_measures(float e_s, float power_s, float p_t, float power_t) {
    // A power may be -inf.
    student_power = fmaf(e_s, fmaxf(power_s, -1000.0f), student_power);
    if (p_t != 0.0f) teacher_power = fmaf(p_t, power_t, teacher_power);
  }
};

// Adds p_s - p_t + p_t l as excess + ln(2) kl, with l = log p_t - log p_s and `ratio` = l / ln(2).
//
// If l is small, the term is p_t phi with phi = exp(-l) - 1 + l = l^2 (1/2 - l/6 + l^2/24 - l^3/120
// ...), with a relative error of 3e-6 for |l| < 0.0866. The last term is economized by Chebyshev's
// T3.
__device__ __forceinline__ void add_term(float p_t, float ratio, float difference, float& kl,
                                         float& excess) {
  constexpr float kNear = 0.125f;
  float series = fmaf(kLn2 * kLn2 * kLn2 / 24, ratio,
                      -kLn2 * kLn2 * (1.0f / 6 + 0.75f * kNear * kNear * kLn2 * kLn2 / 120));
  series = fmaf(series, ratio, kLn2 / 2);
  const float phi = series * ratio * ratio;
  const bool near = fabsf(ratio) < kNear;
  if (!near) excess += difference;
  const float slope = near ? phi : ratio;
  if (p_t != 0.0f) kl = fmaf(p_t, slope, kl);  // else `slope` may be NaN
}

// In a gradient a larger log(p_s / p_t) counts as this: it is infinite where the teacher excludes a
// token.
constexpr float kLargestRatio = 1000.0f;

// A token's probabilities and their logarithms to base 2, for divergences other than KL(p_t, p_s).
template <class Normalizer>
struct Token {
  float power_s, power_t;
  float e_s;  // p_s before the division by the total
  float p_s, p_t;
  float ratio;  // log2(p_t / p_s)

  __device__ __forceinline__ Token(float y_s, float y_t, const Normalizer& student,
                                   const Normalizer& teacher, float exponent)
      : power_s(student.power(y_s, exponent)),
        power_t(teacher.power(y_t, exponent)),
        e_s(exp2_fast(power_s)),
        p_s(student.probability(e_s)),
        p_t(teacher.probability(exp2_fast(power_t))),
        ratio(power_t - power_s + (student.shift - teacher.shift)) {}
};

// The divergences D. The gradient of KL(p_t, p_s) is p_s - p_t; that of the others is
// p_s (r - sum_v p_s r), which needs a sum over the row first. Their `add` adds the term of a token
// as add_term does, and returns r.
struct ForwardKL {};

struct ReverseKL {  // KL(p_s, p_t), r = log(p_s / p_t)
  __device__ explicit ReverseKL(const DualKLParams&) {}

  __device__ __forceinline__ float add(float p_s, float p_t, float ratio, float& kl,
                                       float& excess) const {
    add_term(p_s, -ratio, p_t - p_s, kl, excess);
    const float r = -kLn2 * ratio;
    return r > kLargestRatio ? kLargestRatio : r;
  }
};

// beta KL(p_t, m) + (1 - beta) KL(p_s, m), m = beta p_t + (1 - beta) p_s;
// r = (1 - beta) log(p_s / m)
struct JensenShannon {
  float beta;
  float rest;

  __device__ explicit JensenShannon(const DualKLParams& params)
      : beta(params.beta), rest(params.rest) {}

  __device__ __forceinline__ float add(float p_s, float p_t, float ratio, float& kl,
                                       float& excess) const {
    const bool more = ratio > 0.0f;
    const float log_m = log2_of_mixture(more ? beta : rest, more ? rest : beta, -fabsf(ratio));
    const float below_t = more ? -log_m : ratio - log_m;  // log2(p_t / m)
    const float below_s = more ? -log_m - ratio : -log_m;
    const float m = fmaf(beta, p_t, rest * p_s);
    add_term(beta * p_t, below_t, beta * (m - p_t), kl, excess);
    add_term(rest * p_s, below_s, rest * (m - p_s), kl, excess);
    return rest * kLn2 * below_s;
  }

 private:
  // Returns log2(own + other 2^power) for own + other = 1 and power <= 0, also near 0 with a small
  // relative error.
  static __device__ __forceinline__ float log2_of_mixture(float own, float other, float power) {
    const float below = other * expm1f(kLn2 * power);
    const float log = below > -0.25f ? log1pf(below) : logf(fmaf(other, exp2_fast(power), own));
    return kLog2e * log;
  }
};

// The sums over a row that its gradient needs: of p_s r and of p_s, which rounding keeps from 1.
template <class T>
struct alignas(2 * sizeof(T)) Means {
  T ratio = 0;
  T mass = 0;
};

}  // namespace leaf::cuda
