#pragma once

// The terms of a pair of logits in the sums of a row, from the probabilities and their logarithms
// to base 2.

#include "device.cuh"
#include "softmax.cuh"

namespace leaf::cuda {

// The sums over a row, by a thread in float32: the divergence in nats, and for both models the sum
// of 2^power * power, the student's not yet divided by its total. The logarithms of the totals turn
// these into entropies.
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

}  // namespace leaf::cuda
