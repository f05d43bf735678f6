#pragma once

#include <cstdint>

#include "leaf/dtype.h"
#include "leaf/threads.h"

namespace leaf {

// Rows of `width` contiguous elements; row i = (i / inner, i % inner) starts at
// data[(i / inner) * outer_stride + (i % inner) * inner_stride]. Strides count elements.
struct RowsView {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t width;
};

struct GradNormParams {
  RowsView grad;
  float* norm;  // [rows]
};

namespace cpu {
void grad_norm(const GradNormParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
// Computes one tensor, or two in one launch; `second` may be null.
int grad_norm(const GradNormParams& first, const GradNormParams* second, void* stream);
}  // namespace cuda

}  // namespace leaf
