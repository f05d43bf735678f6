#pragma once

#include "leaf/dtype.h"

namespace leaf::cpu {

// Returns n elements of any dtype as float32: the source itself if it is float32, else `buffer`.
const float* load_floats(const void* source, DType dtype, int64_t n, float* buffer);

// Rounds n float32 values to the dtype of the target.
void store_floats(const float* source, int64_t n, DType dtype, void* target);

}  // namespace leaf::cpu
