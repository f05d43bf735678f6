#pragma once

#include <cstdint>

#include "leaf/dtype.h"
#include "leaf/threads.h"

namespace leaf {

// to = from * factor, multiplied in float32 and rounded once, in rows of `width` contiguous
// elements. `to` may be `from`; a factor of 1 then leaves the memory untouched.
struct ScaleParams {
  const void* from;
  DType from_dtype;
  int64_t from_row_stride;
  void* to;
  DType to_dtype;
  int64_t to_row_stride;
  int64_t rows;
  int64_t width;        // below 2^31 - 64
  const float* factor;  // []
};

namespace cpu {
void scale(const ScaleParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
int scale(const ScaleParams& params, void* stream);
}  // namespace cuda

}  // namespace leaf
