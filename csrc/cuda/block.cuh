#pragma once

// Reductions and scans over a warp and over a one-dimensional block of whole warps. The order is
// fixed: in combine(a, b) a comes from lower threads than b, and the tree depends on the number of
// threads only. Values are trivially copyable and consist of 4-byte words.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "device.cuh"

namespace leaf::cuda {

constexpr int kMaxWarps = 32;  // in a block
constexpr int kMaxThreads = kMaxWarps * kWarp;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

// Minimum, maximum and sum of integers.
template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
__device__ __forceinline__ T plus(T a, T b) {
  return a + b;
}

// Returns the value that another lane passes. All lanes of the warp must call it.
template <class T>
__device__ __forceinline__ T shuffle(const T& value, int from_lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(unsigned) == 0);
  // memcpy would take the value through local memory.
  struct Words {
    unsigned word[sizeof(T) / sizeof(unsigned)];
  };
  Words words = __builtin_bit_cast(Words, value);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(unsigned)); ++i) {
    words.word[i] = __shfl_sync(kFullMask, words.word[i], from_lane);
  }
  return __builtin_bit_cast(T, words);
}

// Reduces over the first `lanes` lanes of the warp; all lanes get the same bits.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, const Combine& combine, int lanes = kWarp) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = lane ^ step;
    const T theirs = shuffle(value, other);
    if (other < lanes) value = combine(value, theirs);
  }
  // Only lane 0 has combined all pairs in order.
  return shuffle(value, 0);
}

// Reduces over the warp for a commutative `combine`; all lanes get the same bits.
template <class T, class Combine>
__device__ __forceinline__ T warp_all(T value, const Combine& combine) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    value = combine(value, shuffle(value, lane_index() ^ step));
  }
  return value;
}

// Inclusive scan over the lanes of the warp.
template <class T, class Combine>
__device__ __forceinline__ T warp_inclusive_scan(T value, const Combine& combine) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = shuffle(value, (lane - step) & (kWarp - 1));
    if (lane >= step) value = combine(before, value);
  }
  return value;
}

// Reduces over all threads of the block, of at most kWarps warps; all threads get the same bits.
// `shared` may be used for this again at once; any other use needs a barrier first.
template <class T, class Combine, int kWarps>
__device__ __forceinline__ T block_reduce(T value, const Combine& combine, T (&shared)[kWarps]) {
  value = warp_reduce(value, combine);
  __syncthreads();  // the array may still be read
  if (lane_index() == 0) shared[warp_index()] = value;
  __syncthreads();
  if (lane_index() < warp_count()) value = shared[lane_index()];
  return warp_reduce(value, combine, warp_count());
}

template <class T>
struct Scan {
  T before;  // of the threads before this one
  T total;   // of all threads
};

// Exclusive scan, with the rules of block_reduce. combine(identity, x) must be x.
template <class T, class Combine>
__device__ __forceinline__ Scan<T> block_scan(const T& value, const T& identity,
                                              const Combine& combine, T (&shared)[kMaxWarps]) {
  const int lane = lane_index();
  const int warp = warp_index();
  const T inclusive = warp_inclusive_scan(value, combine);
  __syncthreads();  // the array may still be read
  if (lane == kWarp - 1) shared[warp] = inclusive;
  __syncthreads();
  T of_warps = identity;
  if (lane < warp_count()) of_warps = shared[lane];
  of_warps = warp_inclusive_scan(of_warps, combine);

  const T lanes_before = shuffle(inclusive, (lane - 1) & (kWarp - 1));
  const T warps_before = shuffle(of_warps, (warp - 1) & (kWarp - 1));
  Scan<T> scan{warp > 0 ? warps_before : identity, shuffle(of_warps, warp_count() - 1)};
  if (lane > 0) scan.before = combine(scan.before, lanes_before);
  return scan;
}

}  // namespace leaf::cuda
