#pragma once

// A sequence of tokens and its division among the threads of a block.

#include <cstdint>
#include <limits>

#include "block.cuh"
#include "leaf/detect_spans.h"

namespace leaf::cuda {

// Positions within a sequence fit into int, also those of a last round that passes its end.
constexpr int64_t kMaxLength = std::numeric_limits<int>::max() - 2 * kMaxThreads * kWarp;

// One sequence, which one block processes. The 32 lanes of a warp take the tokens of a word. A warp
// has up to 32 consecutive words; the words of all warps are a tile. All passes use the same
// division, so that a thread reads the scores that it has written itself.
struct Sequence {
  const DetectSpansParams& params;
  int64_t begin;
  int size;
  int words;
  int words_of_warp;  // words of a warp in a tile

  __device__ __forceinline__ Sequence(const DetectSpansParams& params, int64_t begin, int64_t stop)
      : params(params),
        begin(begin),
        size(static_cast<int>(stop - begin)),
        words((size + kWarp - 1) / kWarp),
        words_of_warp(smaller(larger((words + warp_count() - 1) / warp_count(), 1), kWarp)) {}

  __device__ __forceinline__ float teacher(int token) const {
    return __ldg(params.teacher + (begin + token));
  }
  __device__ __forceinline__ float student(int token) const {
    return __ldg(params.student + (begin + token));
  }
  __device__ __forceinline__ bool in_domain(int token) const {
    return __ldg(params.domain + (begin + token)) != 0;
  }
  __device__ __forceinline__ bool prunable(int token) const {
    return params.prunable == nullptr || __ldg(params.prunable + (begin + token)) != 0;
  }
  __device__ __forceinline__ float& score(int token) const { return params.score[begin + token]; }
  __device__ __forceinline__ uint8_t& confounder(int token) const {
    return params.confounder[begin + token];
  }

  __device__ __forceinline__ int tile_words() const { return warp_count() * words_of_warp; }
  __device__ __forceinline__ int first_word(int tile) const {
    return tile + warp_index() * words_of_warp;
  }
  __device__ __forceinline__ bool inside(int token) const {
    return token < size && in_domain(token);
  }

  // Calls visit(i, token) for word i of the warp; tokens may lie beyond the sequence.
  template <int kUnroll, class Visit>
  __device__ __forceinline__ void for_tile(int tile, const Visit& visit) const {
    const int first = first_word(tile);
    const int count = smaller(words_of_warp, words - first);
#pragma unroll kUnroll
    for (int i = 0; i < count; ++i) visit(i, (first + i) * kWarp + lane_index());
  }

  // Calls visit(token) for each token of this thread.
  template <int kUnroll, class Visit>
  __device__ __forceinline__ void for_tokens(const Visit& visit) const {
    for (int tile = 0; tile < words; tile += tile_words()) {
      for_tile<kUnroll>(tile, [&](int, int token) { visit(token); });
    }
  }
};

}  // namespace leaf::cuda
