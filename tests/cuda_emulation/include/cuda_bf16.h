#pragma once

// bfloat16 is converted as the CPU kernels convert it, which their own tests hold against torch.

#include "../../../csrc/cpu/simd.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {leaf::cpu::to_bfloat16(x)}; }
