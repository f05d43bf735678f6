#pragma once

#include <cstdint>

#include "leaf/dtype.h"
#include "leaf/logits.h"
#include "leaf/threads.h"

namespace leaf {

struct DualKLParams {
  Logits student;
  Logits teacher;
  const float* row_weight;  // [rows]; rows of weight 0 are never read
  int64_t rows;
  float temperature;

  // [rows, student.vocab], or null for no gradient. It may be the memory of the student's logits.
  // On a GPU its dtype may then be narrower; each row starts where the row of logits starts.
  void* grad;
  DType grad_dtype;  // the student's dtype on a CPU
  int64_t grad_row_stride;
  float* loss;         // []
  float* grad_scale;   // []
  float* row_results;  // [4, rows] divergence, student entropy, teacher entropy, agreement; or null

  // The divergence: 0 for KL(p_t, p_s), 1 for KL(p_s, p_t), otherwise the share of p_t in the
  // mixture of the Jensen-Shannon divergence; `rest` is the share of p_s.
  float beta;
  float rest;
  float slope_bound = 1.0f;  // of |dD/dx_s|; a row's gradient is w T scale dD/dx_s
};

namespace cpu {
void dual_kl(const DualKLParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
// Returns how many floats of scratch memory on the device the launcher needs.
int64_t dual_kl_scratch(const DualKLParams& params);
int dual_kl(const DualKLParams& params, float* scratch, void* stream);
}  // namespace cuda

}  // namespace leaf
