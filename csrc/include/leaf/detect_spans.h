#pragma once

#include <cstdint>

#include "leaf/threads.h"

namespace leaf {

// If the gap's range is smaller, rounding decides which token is lowest, and no span is reported.
constexpr float kSmallestGapRange = 1e-6f;

// On the logarithmic scale a norm counts as at least this share of the sequence's largest one, so
// that a token whose norm is zero does not set the range of all others.
constexpr float kLogFloor = 1e-4f;

enum DetectStatus : int64_t { kTeacherNotFinite = 1, kStudentNotFinite = 2 };

// How the gap is made: of the normalized values t and s as t - weight s; of their shares of the
// largest norm as log t - weight log s, or as log(t / s) - weight log s.
enum class GapScale { kMinMax, kLog, kLogRatio };

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

  // With logarithms a weight of 1 or 0 makes no error in a gap that is equal everywhere.
  void set_scale(bool log_scale, double student_weight) {
    const bool of_ratio = log_scale && student_weight >= 0.5;
    scale = of_ratio ? GapScale::kLogRatio : log_scale ? GapScale::kLog : GapScale::kMinMax;
    weight = static_cast<float>(of_ratio ? student_weight - 1.0 : student_weight);
  }

  int64_t border(int64_t sequence) const {
    return offsets == nullptr ? sequence * max_length : offsets[sequence];
  }

  GapScale scale;
  float weight;
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
