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

  // [rows, student.vocab]; null: none. May be the memory of the student, also as rows of a narrower
  // dtype, each of which starts where the student's does (on a GPU).
  void* grad;
  DType grad_dtype;  // on a CPU the student's
  int64_t grad_row_stride;
  float* loss;         // []
  float* grad_scale;   // []
  float* row_results;  // [4, rows] KL, student entropy, teacher entropy, agreement; null: none
};

namespace cpu {
void dual_kl(const DualKLParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
// A launcher needs so many floats of scratch memory on the device.
int64_t dual_kl_scratch(const DualKLParams& params);
int dual_kl(const DualKLParams& params, float* scratch, void* stream);
}  // namespace cuda

}  // namespace leaf
