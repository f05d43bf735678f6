#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace leaf::cpu {

// Zeroes memory that is too large for the caches. On x86 the stores bypass them, so that no cache
// line is read before it is overwritten.
inline void zero_uncached(void* memory, size_t bytes) {
#ifdef __SSE2__
  auto* begin = static_cast<char*>(memory);
  const size_t head = (16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16;
  if (bytes >= 64 + head) {
    std::memset(begin, 0, head);
    begin += head;
    bytes -= head;
    for (; bytes >= 64; begin += 64, bytes -= 64) {
      auto* line = reinterpret_cast<__m128i*>(begin);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(line + i, _mm_setzero_si128());
    }
    _mm_sfence();
  }
  memory = begin;
#endif
  std::memset(memory, 0, bytes);
}

}  // namespace leaf::cpu
