#pragma once

#include <cstdint>

#include "leaf/dtype.h"
#include "leaf/threads.h"

namespace leaf {

// One model's logits: rows of `vocab` contiguous elements. A logit z acts as
// softcap * tanh(scale * z / softcap), or scale * z where softcap is 0.
struct Logits {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t vocab;
  float scale;
  float softcap;
};

struct DualKLParams {
  Logits student;
  Logits teacher;
  const float* row_weight;  // [rows]; rows of weight 0 are never read
  int64_t rows;
  float temperature;

  void*
      grad;  // [rows, student.vocab] in the student's dtype, may be the student itself; null: none
  int64_t grad_row_stride;
  float* loss;         // []
  float* grad_scale;   // []
  float* row_results;  // [4, rows] KL, student entropy, teacher entropy, agreement; null: none
};

namespace cpu {
void dual_kl(const DualKLParams& params, const Threads& threads);
}  // namespace cpu

}  // namespace leaf
