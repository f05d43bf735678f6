#pragma once

// Functions shared by the vector loops. They are plain C++ that a compiler vectorises when it
// inlines them into a loop under `#pragma omp simd`: they contain selects and no branches.

#include <bit>
#include <cstdint>

// Compiles one body for AVX-512, AVX2 and the baseline; the loader picks one when it loads the
// library. LEAF_SINGLE_ISA is set if one instruction set is requested, or if the compiler cannot
// clone functions.
#ifdef LEAF_SINGLE_ISA
#define LEAF_CLONES
#else
#define LEAF_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#endif
#define LEAF_INLINE inline __attribute__((always_inline))
#define LEAF_INLINE_LAMBDA __attribute__((always_inline))

namespace leaf::cpu {

// Elements of a block: a few float32 buffers of this size stay in the first-level cache. Sums are
// made block by block, so that results do not depend on how the work is divided.
constexpr int64_t kBlock = 1024;

constexpr float kLog2e = 1.44269504088896341f;

// A sum over a block has kChains partial sums, one for each element of a stretch. They are folded
// into kLanes values, which are added up in float64. This is more accurate than one partial sum per
// register element, equal for every register width, and needs no horizontal operation per block.
constexpr int64_t kChains = 64;
constexpr int64_t kLanes = 16;

struct Lanes {
  float value[kLanes];
};

LEAF_INLINE Lanes fold(const float* chains) {
  Lanes lanes;
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    lanes.value[i] =
        (chains[i] + chains[kLanes + i]) + (chains[2 * kLanes + i] + chains[3 * kLanes + i]);
  }
  return lanes;
}

// Calls body(begin, width) on the stretches of a block; the compiler knows the width of all but the
// last.
template <class Body>
LEAF_INLINE void for_stretches(int64_t n, const Body& body) {
  int64_t begin = 0;
  for (; begin + kChains <= n; begin += kChains) body(begin, kChains);
  if (begin < n) body(begin, n - begin);
}

// Prefetches the bytes [begin, end) of an array; the addresses need not be valid. The processor's
// own prefetching stops at the end of each page.
LEAF_INLINE void prefetch(const void* base, int64_t begin, int64_t end) {
  const auto address = reinterpret_cast<uintptr_t>(base);
  for (int64_t i = begin; i < end; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<uintptr_t>(i)), 0, 2);
  }
}

struct WideLanes {
  double value[kLanes] = {};

  LEAF_INLINE void add(const Lanes& lanes, double factor = 1.0) {
    for (int64_t i = 0; i < kLanes; ++i) value[i] += factor * lanes.value[i];
  }
  // Adds in pairs, which are independent of each other.
  LEAF_INLINE double total() const {
    double sum[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = value[i];
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[half + i];
    }
    return sum[0];
  }
};

// The instruction set of the clones that run in this process.
const char* instruction_set();

// Returns 2^(x scale) for x <= 0 < scale; 0 below 2^-126 (also for -inf), NaN for NaN. `lowest` is
// -127 / scale. 2^(x scale) = 2^n 2^f, where n is the nearest integer and 2^f is a polynomial with
// a relative error of 2e-9. With a fused multiply-add the product x scale is never rounded. The
// clamp makes the exponent bits of 2^n zero, which saves a select.
LEAF_INLINE float exp2_nonpositive(float x, float scale, float lowest) {
  // Adding kRound leaves the nearest integer plus the exponent's bias in the low bits.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  x = lowest > x ? lowest : x;
  const float shifted = x * scale + kRound;
  const float f = x * scale - (shifted - kRound);
  float p = 0x1.41fbbap-13f;
  p = p * f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
}

// Returns log(x) of a normal x > 0 with a relative error of 2e-7, also near 1 if `above` = x - 1 is
// that exact: 2 atanh(z) of the significand, in [sqrt(1/2), sqrt(2)), and the exponent's part.
LEAF_INLINE float log_of(float x, float above) {
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float rest = std::bit_cast<float>(bits - exponent * (1 << 23));
  above = exponent == 0 ? above : rest - 1.0f;
  const float z = above / (2.0f + above);
  const float square = z * z;
  float series = 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  const float log = 2.0f * z + 2.0f * z * square * series;
  constexpr float kLn2 = 0.693147180559945309f;
  return static_cast<float>(exponent) * kLn2 + log;
}

// Returns tanh(u) and stores 1 - tanh(u)^2, both with a relative error of 5e-7: a polynomial near
// 0, otherwise 1 - 2 / (e^2u + 1).
LEAF_INLINE float tanh_and_slope(float u, float* slope) {
  const float z = u * u;
  float q = -5.66078070551157e-3f;
  q = q * z + 2.0601999014616013e-2f;
  q = q * z - 5.372922867536545e-2f;
  q = q * z + 1.3331328332424164e-1f;
  q = q * z - 3.3333277702331543e-1f;
  const float near = u + u * z * q;
  const uint32_t sign = std::bit_cast<uint32_t>(u) & 0x80000000u;
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(u) ^ sign);
  const float e = exp2_nonpositive(-magnitude, 2 * kLog2e, -127 / (2 * kLog2e));  // exp(-2 |u|)
  const float r = 2.0f * e / (1.0f + e);                                          // 1 - tanh |u|
  const float far = std::bit_cast<float>(std::bit_cast<uint32_t>(1.0f - r) | sign);
  const bool small = magnitude < 0.625f;
  *slope = small ? 1.0f - near * near : r * (2.0f - r);
  return small ? near : far;
}

LEAF_INLINE float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// The upper half of the result is the bfloat16, rounded to nearest even; NaN stays NaN.
LEAF_INLINE uint32_t bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return value == value ? rounded : 0x7fc00000u;
}
LEAF_INLINE uint16_t to_bfloat16(float value) {
  return static_cast<uint16_t>(bfloat16_bits(value) >> 16);
}

// Uses integer arithmetic, because the baseline has no conversion instructions.
LEAF_INLINE float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int32_t payload = bits & 0x7fff;
  const float tiny = static_cast<float>(payload) * 0x1p-24f;  // subnormal and zero
  const uint32_t normal = (static_cast<uint32_t>(payload) << 13) + 0x38000000u;
  const uint32_t special = (static_cast<uint32_t>(payload) << 13) + 0x70000000u;  // inf, NaN
  uint32_t magnitude = payload < 0x0400 ? std::bit_cast<uint32_t>(tiny) : normal;
  magnitude = payload >= 0x7c00 ? special : magnitude;
  return std::bit_cast<float>(magnitude | sign);
}

LEAF_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const auto ordered = static_cast<int32_t>(magnitude);  // the baseline compares signed integers
  // Below 2^-14: adding 0.5 makes the float32 unit round to multiples of 2^-24.
  const uint32_t tiny =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = ordered < 0x38800000 ? tiny : normal;
  half = ordered >= 0x477ff000 ? 0x7c00u : half;  // from 65520 on: inf
  half = ordered > 0x7f800000 ? 0x7e00u : half;   // NaN
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
}

}  // namespace leaf::cpu
