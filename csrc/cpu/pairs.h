#pragma once

// Loops over float32 or bfloat16 elements in memory, without conversion to a buffer.
//
// In a loop over elements of two widths a compiler shuffles and chooses shorter vectors. A stretch
// of kChains elements is therefore handled as kPairs pairs: elements i and kPairs + i of float32,
// or the two bfloat16 elements of a 32-bit word, each of which is the upper half of a float32.

#include <bit>
#include <cstdint>

#include "simd.h"

namespace leaf::cpu {

constexpr int64_t kPairs = kChains / 2;

struct BFloat16 {
  uint16_t bits;
};

LEAF_INLINE float load(const float* x) { return *x; }
LEAF_INLINE float load(const BFloat16* x) { return from_bfloat16(x->bits); }
LEAF_INLINE void store(float value, float* x) { *x = value; }
LEAF_INLINE void store(float value, BFloat16* x) { x->bits = to_bfloat16(value); }

// Loads the first or second element of pair i of a stretch.
LEAF_INLINE float load_first(const float* stretch, int64_t i) { return stretch[i]; }
LEAF_INLINE float load_second(const float* stretch, int64_t i) { return stretch[kPairs + i]; }
LEAF_INLINE void store_pair(float first, float second, float* stretch, int64_t i) {
  stretch[i] = first;
  stretch[kPairs + i] = second;
}

LEAF_INLINE uint32_t load_word(const BFloat16* stretch, int64_t i) {
  uint32_t word;
  __builtin_memcpy(&word, stretch + 2 * i, sizeof(word));  // the address may be any even one
  return word;
}
LEAF_INLINE float load_first(const BFloat16* stretch, int64_t i) {
  return std::bit_cast<float>(load_word(stretch, i) << 16);
}
LEAF_INLINE float load_second(const BFloat16* stretch, int64_t i) {
  return std::bit_cast<float>(load_word(stretch, i) & 0xffff0000u);
}
LEAF_INLINE void store_pair(float first, float second, BFloat16* stretch, int64_t i) {
  const uint32_t word = bfloat16_bits(first) >> 16 | (bfloat16_bits(second) & 0xffff0000u);
  __builtin_memcpy(stretch + 2 * i, &word, sizeof(word));
}

}  // namespace leaf::cpu
