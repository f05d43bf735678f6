#pragma once

#include <cstdint>

#include "leaf/threads.h"

namespace leaf {

// If the gap's range is smaller, rounding decides which token is lowest, and no span is reported.
constexpr float kSmallestGapRange = 1e-6f;

enum DetectStatus : int64_t { kTeacherNotFinite = 1, kStudentNotFinite = 2 };

struct DetectSpansParams {
  const float* teacher;  // [tokens] norms
  const float* student;  // [tokens] norms
  // Masks are bytes, 0 = false, because loops over bool do not vectorize.
  const uint8_t* domain;    // [tokens]
  const uint8_t* prunable;  // [tokens], or null: the whole domain
  // [sequences + 1], ascending: sequence b is [offsets[b], offsets[b + 1]). If null, it is
  // [b * max_length, (b + 1) * max_length). On a GPU they are in its memory and unchecked.
  const int64_t* offsets;
  int64_t tokens;
  int64_t sequences;
  int64_t max_length;  // of a sequence
  int64_t max_spans;   // ceil(max_length / 2)

  int64_t border(int64_t sequence) const {
    return offsets == nullptr ? sequence * max_length : offsets[sequence];
  }

  double threshold;
  bool quantile;
  double cap;
  double teacher_max;  // +inf: no bound
  int64_t join_gap;
  int64_t min_length;

  int64_t* span;        // [sequences, max_spans, 2]
  int64_t* count;       // [sequences]
  float* score;         // [tokens]
  uint8_t* confounder;  // [tokens] 0 or 1
  int64_t* status;      // [sequences]
};

namespace cpu {
void detect_spans(const DetectSpansParams& params, const Threads& threads);
}  // namespace cpu

namespace cuda {
int detect_spans(const DetectSpansParams& params, void* stream);
}  // namespace cuda

}  // namespace leaf
