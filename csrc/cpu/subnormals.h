#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace leaf::cpu {

// While one exists, on x86 this thread's results below the normal numbers become 0. Such processors
// take a hundred cycles for each of them, and of a peaked softmax most probabilities are such.
class [[maybe_unused]] FlushSubnormals {
#ifdef __SSE__
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#endif
};

}  // namespace leaf::cpu
