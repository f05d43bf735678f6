#pragma once

#include <cstdint>

#include "leaf/dtype.h"

namespace leaf {

// One model's logits: rows of `vocab` contiguous elements. A logit z is used as
// softcap * tanh(scale * z / softcap), or as scale * z if softcap is 0.
struct Logits {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t vocab;
  float scale;
  float softcap;
};

}  // namespace leaf
