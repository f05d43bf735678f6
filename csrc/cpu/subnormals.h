#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace leaf::cpu {

// While an object exists, this thread's subnormal results become 0 on x86. These processors take a
// hundred cycles for each, and most probabilities of a peaked softmax are subnormal.
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
