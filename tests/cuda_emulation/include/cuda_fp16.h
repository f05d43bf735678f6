#pragma once

// float16 is converted by the CPU kernels' functions, which are tested against torch.

#include <type_traits>

#include "../../../csrc/cpu/simd.h"

struct __half {
  unsigned short bits;
};
// Like CUDA's type it is not trivially copyable.
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half x, __half y) : x(x), y(y) {}
  __half2(const __half2& other) : x(other.x), y(other.y) {}
  __half2& operator=(const __half2&) = default;
};
static_assert(sizeof(__half2) == 4 && std::is_standard_layout_v<__half2>);

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return leaf::cpu::from_float16(x.bits); }
inline __half __float2half_rn(float x) { return {leaf::cpu::to_float16(x)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

namespace leaf::emulation {
// The result is NaN only if both are; +0 is larger than -0.
template <float value(uint16_t)>
unsigned short larger(unsigned short a, unsigned short b) {
  if (value(a) != value(a)) return value(b) != value(b) ? 0x7fff : b;
  if (value(a) == value(b)) return a & b;
  return value(a) < value(b) ? b : a;
}
template <float value(uint16_t), class Pair>
Pair larger(const Pair& a, const Pair& b) {
  return {{larger<value>(a.x.bits, b.x.bits)}, {larger<value>(a.y.bits, b.y.bits)}};
}
}  // namespace leaf::emulation

inline __half2 __hmax2(const __half2& a, const __half2& b) {
  return leaf::emulation::larger<leaf::cpu::from_float16>(a, b);
}
