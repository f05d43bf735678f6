#pragma once

// What a pair of logits adds to the sums of a row, of its probabilities and their logarithms to
// base 2.

#include "device.cuh"
#include "softmax.cuh"

namespace leaf::cuda {

// What is summed over a row once its softmax is known: in nats, entropies in bits.
struct Sums {
  float kl = 0.0f;
  float student_entropy = 0.0f;
  float teacher_entropy = 0.0f;
};

// Adds p_s - p_t + p_t l, as excess + ln(2) kl, for l = log p_t - log p_s, of which `ratio` is l /
// ln(2).
//
// Where l is small, that is p_t phi with phi = exp(-l) - 1 + l = l^2 (1/2 - l/6 + l^2/24 - l^3/120
// ...), to a relative 3e-6 for |l| < 0.0866. The last term is spread over l as Chebyshev's T3 does
// it.
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

__device__ __forceinline__ float entropy_term(float p, float log_p) {
  return p * fmaxf(log_p, -1000.0f);  // p may be 0 and its logarithm -inf
}

}  // namespace leaf::cuda
