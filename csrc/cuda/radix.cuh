#pragma once

// Selects the value of a given rank without sorting. It finds the digits of the value's bits from
// the highest on, by counting the values that begin with the digits found so far.

#include "block.cuh"

namespace leaf::cuda {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsOfLane = kBins / kWarp;

// The highest digits of the value, and its rank among the values that begin with these digits.
struct Digits {
  unsigned prefix;
  int rank;
};

// Counts a value if it begins with the digits; its lowest `shift` bits are ignored.
__device__ __forceinline__ void count_digit(unsigned bits, int shift, const Digits& digits,
                                            int (&histogram)[kBins]) {
  const unsigned high = bits >> shift;
  if (high >> kDigitBits == digits.prefix) atomicAdd(&histogram[high % kBins], 1);
}

// Called by one warp: finds the next digit from the counts and resets them to zero.
__device__ __forceinline__ Digits next_digit(const Digits& digits, int (&histogram)[kBins]) {
  const int first = lane_index() * kBinsOfLane;
  int counts[kBinsOfLane];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfLane; ++i) {
    counts[i] = histogram[first + i];
    histogram[first + i] = 0;
    sum += counts[i];
  }
  const int up_to = warp_inclusive_scan(sum, plus<int>);
  int rank = digits.rank - (up_to - sum);
  int digit = first;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kBinsOfLane; ++i) {
    found = found || rank < counts[i];
    rank -= found ? 0 : counts[i];
    digit += found ? 0 : 1;
  }
  const unsigned beyond = __ballot_sync(kFullMask, up_to > digits.rank);
  const unsigned prefix = digits.prefix << kDigitBits | static_cast<unsigned>(digit);
  return shuffle(Digits{prefix, rank}, __ffs(beyond) - 1);
}

}  // namespace leaf::cuda
