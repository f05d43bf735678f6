#pragma once

// Finds runs of marks. A thread has the marks of 32 tokens as the bits of a word.

#include "block.cuh"

namespace leaf::cuda {

// Bit i is the token at position base + i.
struct Word {
  int base;
  unsigned marks;
  unsigned walls;  // tokens outside the domain
};

// The positions of the latest confounder and of the latest token outside the domain; -1 = none yet.
struct Latest {
  int mark;
  int wall;
};

__device__ __forceinline__ Latest later(const Latest& a, const Latest& b) {
  return {larger(a.mark, b.mark), larger(a.wall, b.wall)};
}

__device__ __forceinline__ unsigned bits_below(int bit) { return (1u << bit) - 1; }

// Returns the position of the highest set bit, or `before` if there is none.
__device__ __forceinline__ int latest(unsigned bits, int base, int before) {
  return bits == 0 ? before : base + 31 - __clz(static_cast<int>(bits));
}

// Returns the marks that start a run.
__device__ __forceinline__ unsigned starts_of(const Word& word, const Latest& before,
                                              int64_t join_gap) {
  unsigned starts = 0;
  for (unsigned rest = word.marks & ~(word.marks << 1); rest != 0; rest &= rest - 1) {
    const int bit = __ffs(static_cast<int>(rest)) - 1;
    const int mark = latest(word.marks & bits_below(bit), word.base, before.mark);
    const int wall = latest(word.walls & bits_below(bit), word.base, before.wall);
    const bool joined = mark > wall && word.base + bit - mark - 1 <= join_gap;
    if (!joined) starts |= 1u << bit;
  }
  return starts;
}

// Calls visit(start, stop) for each run that a start closes and that is long enough.
template <class Visit>
__device__ __forceinline__ void for_closed(const Word& word, unsigned starts, int mark_before,
                                           int start_before, int64_t min_length,
                                           const Visit& visit) {
  int open = start_before;
  for (; starts != 0; starts &= starts - 1) {
    const int bit = __ffs(static_cast<int>(starts)) - 1;
    const int stop = latest(word.marks & bits_below(bit), word.base, mark_before) + 1;
    if (open >= 0 && stop - open >= min_length) visit(open, stop);
    open = word.base + bit;
  }
}

}  // namespace leaf::cuda
