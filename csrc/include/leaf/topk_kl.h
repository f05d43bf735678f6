#pragma once

#include <cstdint>

#include "leaf/dtype.h"
#include "leaf/logits.h"
#include "leaf/threads.h"

namespace leaf {

struct TopkKLParams {
  Logits student;
  const int64_t* ids;       // [rows, k]; ids outside of the vocabulary are left out
  const float* logprobs;    // [rows, k] of the teacher
  const float* tail;        // [rows] of all other ids together
  int64_t k;                // at most kMostTopk
  const float* row_weight;  // [rows]; rows of weight 0 are never read
  int64_t rows;
  float temperature;

  // As in DualKLParams.
  void* grad;
  DType grad_dtype;
  int64_t grad_row_stride;
  float* loss;
  float* grad_scale;
  float* row_results;
  float slope_bound = 1.0f;
};

constexpr int64_t kMostTopk = 1024;

namespace cpu {
void topk_kl(const TopkKLParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
// Returns how many floats of scratch memory on the device the launcher needs.
int64_t topk_kl_scratch(const TopkKLParams& params);
int topk_kl(const TopkKLParams& params, float* scratch, void* stream);
}  // namespace cuda

}  // namespace leaf
