#pragma once

// float16 is converted as the CPU kernels convert it, which their own tests hold against torch.

#include "../../../csrc/cpu/simd.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return leaf::cpu::from_float16(x.bits); }
inline __half __float2half_rn(float x) { return {leaf::cpu::to_float16(x)}; }
