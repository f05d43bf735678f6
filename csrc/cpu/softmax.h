#pragma once

// The softmax of one row of one model's logits, in blocks of kRowBlock.
//
// With y the scaled, capped logit, over the first `vocab` elements and with temperature T:
//
//     p = exp((y - m) / T) / d,    d = sum_v exp((y - m) / T)
//     H(p) = log d - sum_v p (y - m) / T
//
// A block stores exp((y - its own maximum) / T); merging gives the factor of each block that turns
// this into p. So each logit costs one exponential, and is read from memory once.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "leaf/dual_kl.h"
#include "pairs.h"
#include "simd.h"

namespace leaf::cpu {

// Long enough that what a block costs beside its elements is little.
constexpr int64_t kRowBlock = 4096;

// With x = y - max over a block: the sums of exp(x / T) and, for the entropy, of x exp(x / T).
struct BlockStatistics {
  float max;
  Lanes sum;
  Lanes moment;
};

class SoftmaxRow {
 public:
  // `narrow`: logits of bfloat16 that need no arithmetic (see is_narrow) are used as they lie.
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

  // y of one block, in `buffer` or where the logits lie, float32 unless `narrow`; slope =
  // dy/d(scale z), only with a softcap.
  const void* load(int64_t row, int64_t block, float* buffer, float* slope) const;

  // First phase: blocks in any order, by any thread; then merge, which keeps to their order.
  void compute_block(int64_t row, int64_t block);
  void merge();

  // Of the merged row. p of a block is exps * factor; exps has the elements of a stretch in the
  // order first of each pair, second of each pair.
  const float* exps(int64_t block) const { return exps_ + block * kRowBlock; }
  float factor(int64_t block) const { return factor_[block]; }
  double max() const { return max_; }
  double log_sum() const { return log_sum_; }  // log d
  double entropy() const { return entropy_; }  // where it was asked for
  int64_t argmax(int64_t row) const;           // of the logits as they came; the first of equals

 private:
  const void* address(int64_t row, int64_t block) const;

  Logits logits_;
  int64_t vocab_;
  double temperature_;
  bool with_entropy_;
  bool narrow_;
  std::vector<BlockStatistics> statistics_;  // [blocks]
  std::vector<float> factor_;                // [blocks]
  float* exps_;                              // [scratch_size(vocab)]
  int64_t max_block_ = 0;
  double max_ = 0.0;
  double log_sum_ = 0.0;
  double entropy_ = 0.0;
};

}  // namespace leaf::cpu
