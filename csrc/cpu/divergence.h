#pragma once

// The terms of a divergence D of two distributions over a block of a row, and its gradient, from
// the probabilities and l = log p_t - log p_s:
//
//     KL(p_t, p_s)      D = sum_v p_s - p_t + p_t l          dD/dx_s = p_s - p_t
//     KL(p_s, p_t)      D = sum_v p_t - p_s - p_s l          r = -l
//     Jensen-Shannon    D = beta KL(p_t, m) + (1 - beta) KL(p_s, m),  m = beta p_t + (1 - beta) p_s
//                                                            r = (1 - beta) log(p_s / m)
//
// The gradient of the last two, p_s (r - sum_v p_s r), needs a sum over the row first.

#include <cstdint>

#include "simd.h"

namespace leaf::cpu {

// A block of one model's probabilities: p = exps * factor. y is float32, or bfloat16 in
// bfloat16_kl.
struct Side {
  const void* y;
  const float* exps;
  float factor;
};

struct RowScalars {
  float inv_temperature;
  float max_s, max_t;
  float log_ratio;  // log d_s - log d_t
  float grad_scale;
  float beta, rest;   // of the Jensen-Shannon divergence: the shares of teacher and student in m
  float mean = 0.0f;  // sum_v p_s r
};

// Sums over a block.
struct DivergenceSums {
  Lanes terms;
  Lanes ratio;  // p_s r
  Lanes mass;   // p_s, which rounding keeps from 1
};

// KL(p_t, p_s): write grad_scale * (p_s - p_t), which may overwrite student.y, and return the sum
// of the terms. `grad` has the elements of y.
Lanes float32_kl(const Side student, const Side teacher, int64_t n, const RowScalars row,
                 void* grad);
Lanes bfloat16_kl(const Side student, const Side teacher, int64_t n, const RowScalars row,
                  void* grad);

DivergenceSums reverse_kl_sums(const Side student, const Side teacher, int64_t n,
                               const RowScalars row);
DivergenceSums jensen_shannon_sums(const Side student, const Side teacher, int64_t n,
                                   const RowScalars row);

// Write grad_scale * p_s (r - mean), which may overwrite student.y.
void reverse_kl_gradient(const Side student, const Side teacher, int64_t n, const RowScalars row,
                         float* grad);
void jensen_shannon_gradient(const Side student, const Side teacher, int64_t n,
                             const RowScalars row, float* grad);

}  // namespace leaf::cpu
