#pragma once

// bfloat16 is converted by the CPU kernels' functions, which are tested against torch.

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
// Like CUDA's type it is not trivially copyable.
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
  __nv_bfloat162(const __nv_bfloat162& other) : x(other.x), y(other.y) {}
  __nv_bfloat162& operator=(const __nv_bfloat162&) = default;
};
static_assert(sizeof(__nv_bfloat162) == 4 && std::is_standard_layout_v<__nv_bfloat162>);

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {leaf::cpu::to_bfloat16(x)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __hmax2(const __nv_bfloat162& a, const __nv_bfloat162& b) {
  return leaf::emulation::larger<leaf::cpu::from_bfloat16>(a, b);
}
