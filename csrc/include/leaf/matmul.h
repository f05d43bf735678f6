#pragma once

#include <cstdint>

#include "leaf/threads.h"

namespace leaf {

// A matrix of bfloat16 whose rows, or whose columns if it is transposed, are contiguous.
struct Bfloat16Matrix {
  const uint16_t* data;
  int64_t stride;  // between rows, or between columns if it is transposed
  bool transposed;
};

// out = a b, or out += a b, with sums in float32 that are rounded once. A sum begins with what it
// is added to, and its order does not depend on the threads. `out` overlaps neither factor.
struct MatmulParams {
  Bfloat16Matrix a;  // [m, k]
  Bfloat16Matrix b;  // [k, n]
  void* out;         // [m, n] in float32, or in bfloat16
  int64_t out_stride;
  bool out_is_float32;
  bool add;  // needs float32
  int64_t m, n, k;
};

namespace cpu {
// Whether this machine has AMX, which multiplies tiles of bfloat16, and lets this process use it.
// The first call asks for it; from then on Linux wants room for the tiles in signal stacks.
bool has_amx();

// Needs AMX.
void matmul(const MatmulParams& params, const Threads& threads);
}  // namespace cpu

}  // namespace leaf
