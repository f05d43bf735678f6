#pragma once

// The softmax of one row of one model's logits, in blocks of kRowBlock.
//
// y is the scaled, capped logit; sums are over the first `vocab` elements; T is the temperature:
//
//     p = exp((y - m) / T) / d,    d = sum_v exp((y - m) / T)
//     H(p) = log d - sum_v p (y - m) / T
//
// A block stores exp((y - its own maximum) / T). Merging the blocks gives each block the factor
// that turns this into p. Each logit costs one exponential and is read from memory once.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "leaf/logits.h"
#include "pairs.h"
#include "simd.h"

namespace leaf::cpu {

// Long enough to make the overhead of a block small.
constexpr int64_t kRowBlock = 4096;

// Sums over a block, with x = y - max: of exp(x / T) and, for the entropy, of x exp(x / T).
struct BlockStatistics {
  float max;
  Lanes sum;
  Lanes moment;
};

// Returns y of n logits z, in `y` or in the memory of z. Stores slope = dy/d(scale z) if there is a
// softcap.
const float* activate(const Logits& logits, const float* z, int64_t n, float* y, float* slope);

class SoftmaxRow {
 public:
  // The first of the largest unscaled logits.
  struct Largest {
    float value;
    int64_t index;

    void add(const Largest& other) {
      if (other.value > value || (other.value == value && other.index < index)) *this = other;
    }
  };

  // `narrow`: bfloat16 logits that need no arithmetic (see is_narrow) are read without a copy.
  // `scratch`: memory for scratch_size(vocab) floats.
  SoftmaxRow(const Logits& logits, int64_t vocab, float temperature, bool with_entropy, bool narrow,
             float* scratch)
      : logits_(logits),
        vocab_(vocab),
        temperature_(temperature),
        with_entropy_(with_entropy),
        narrow_(narrow),
        statistics_(block_count(vocab)),
        factor_(block_count(vocab)),
        exps_(scratch) {}

  static bool is_narrow(const Logits& logits) {
    return logits.dtype == DType::kBFloat16 && logits.softcap == 0.0f && logits.scale == 1.0f;
  }
  static int64_t block_count(int64_t vocab) { return (vocab + kRowBlock - 1) / kRowBlock; }
  static int64_t scratch_size(int64_t vocab) { return block_count(vocab) * kRowBlock; }
  int64_t block_size(int64_t block) const {
    return std::min(kRowBlock, vocab_ - block * kRowBlock);
  }

  // Returns y of one block, in `buffer` or in the logits' memory, float32 unless `narrow`. Stores
  // slope = dy/d(scale z) if there is a softcap.
  const void* load(int64_t row, int64_t block, float* buffer, float* slope) const;

  // Leaves columns out of the following rows: those of block b are [first[b], first[b + 1]).
  void exclude(const int32_t* first, const int32_t* columns) {
    first_excluded_ = first;
    excluded_ = columns;
  }

  // The first phase: any thread computes blocks in any order; merge() then uses a fixed order.
  void compute_block(int64_t row, int64_t block);
  void merge();

  // After merge(): p of a block is exps * factor. In each stretch of exps the first elements of all
  // pairs come before the second ones.
  const float* exps(int64_t block) const { return exps_ + block * kRowBlock; }
  float factor(int64_t block) const { return factor_[block]; }
  double max() const { return max_; }
  double log_sum() const { return log_sum_; }  // log d
  double entropy() const { return entropy_; }  // if it was requested
  Largest largest(int64_t row) const;
  int64_t argmax(int64_t row) const { return largest(row).index; }

 private:
  const void* address(int64_t row, int64_t block) const;
  const float* without_excluded(const float* values, int64_t block, float* buffer) const;

  Logits logits_;
  int64_t vocab_;
  double temperature_;
  bool with_entropy_;
  bool narrow_;
  std::vector<BlockStatistics> statistics_;  // [blocks]
  std::vector<float> factor_;                // [blocks]
  float* exps_;                              // [scratch_size(vocab)]
  const int32_t* first_excluded_ = nullptr;  // [blocks + 1]
  const int32_t* excluded_ = nullptr;
  int64_t max_block_ = 0;
  double max_ = 0.0;
  double log_sum_ = 0.0;
  double entropy_ = 0.0;
};

}  // namespace leaf::cpu
