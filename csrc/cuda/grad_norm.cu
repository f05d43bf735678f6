// norm = sqrt(sum_h g_h^2). One warp computes a row and reads it from memory once.
//
// The plain sum of squares is right unless it leaves the range of float32. Such a row is computed
// again, scaled by the power of two that brings its largest entry into [1, 2).

#include "leaf/grad_norm.h"

#include <cuda_runtime.h>

#include <cstring>

#include "block.cuh"
#include "element.cuh"
#include "launch.cuh"

namespace leaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
// Loads of 16 bytes that a lane has in flight before it uses the first.
constexpr int kInFlight = 4;
// Blocks on a multiprocessor: few enough to leave each lane the registers for these loads.
constexpr int kBlocks = 5;

// Below this sum, squares that underflowed could matter: one is below 2^-126, so that 2^17 of them
// are 2^-29 of the smallest plain sum.
constexpr float kSmallestPlainSum = 0x1p-80f;
constexpr float kLargestPlainSum = 0x1p127f;
// The largest n for which 2^n and 2^-n are both normal numbers.
constexpr int kLargestExponent = 126;

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// The elements of 16 bytes. A lane takes every 32nd group of a row, also if it is partial or
// unaligned, so that the order of the sum depends on the width only.
template <class T>
struct Group {
  static constexpr int kSize = sizeof(uint4) / sizeof(typename T::Bits);
  typename T::Bits x[kSize];
};

struct Squares {
  float sum;
  float largest;  // the largest magnitude; it ignores NaN, which the sum keeps
};

// One sum for each position in a group; they are added up at the end.
template <class T>
struct LaneSquares {
  float sum[Group<T>::kSize] = {};
  float largest = 0.0f;

  __device__ __forceinline__ void add(const uint4& bits, float factor) {
    Group<T> group;
    memcpy(&group, &bits, sizeof(group));
#pragma unroll
    for (int i = 0; i < Group<T>::kSize; ++i) {
      const float x = T::load(group.x[i]);
      const float scaled = x * factor;
      sum[i] = fmaf(scaled, scaled, sum[i]);
      largest = fmaxf(largest, fabsf(x));
    }
  }

  __device__ __forceinline__ Squares total() const {
    float folded[Group<T>::kSize];
    memcpy(folded, sum, sizeof(sum));
#pragma unroll
    for (int half = Group<T>::kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
    }
    return {folded[0], largest};
  }
};

// Loads group `g` of a row, with zeros beyond the row's end.
template <class T>
__device__ __forceinline__ uint4 load_group(const typename T::Bits* row, int64_t width, int64_t g) {
  Group<T> group;
#pragma unroll
  for (int i = 0; i < Group<T>::kSize; ++i) {
    const int64_t place = g * Group<T>::kSize + i;
    group.x[i] = place < width ? row[place] : 0;
  }
  uint4 bits;
  memcpy(&bits, &group, sizeof(bits));
  return bits;
}

// Adds the groups from `g` on, one by one; for unaligned rows and the ends of rows.
template <class T>
__device__ __forceinline__ void add_groups(const typename T::Bits* row, int64_t width, int64_t g,
                                           float factor, LaneSquares<T>& squares) {
#pragma unroll 1
  for (; g * Group<T>::kSize < width; g += kWarp) {
    squares.add(load_group<T>(row, width, g), factor);
  }
}

// Adds the whole groups of an aligned row and returns the first group that this lane has left.
template <class T>
__device__ __forceinline__ int64_t add_vectors(const typename T::Bits* row, int64_t width,
                                               LaneSquares<T>& squares) {
  const auto* vectors = reinterpret_cast<const uint4*>(row);
  const int64_t groups = width / Group<T>::kSize;
  int64_t g = lane_index();
#pragma unroll 1
  for (; g < groups; g += kInFlight * kWarp) {
    uint4 bits[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t place = g + i * kWarp;
      bits[i] = place < groups ? __ldcs(vectors + place) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) squares.add(bits[i], 1.0f);
  }
  return groups % kWarp == lane_index() ? groups : groups + kWarp;
}

__device__ __forceinline__ Squares of_warp(const Squares& squares) {
  return warp_reduce(squares, [](const Squares& a, const Squares& b) {
    return Squares{a.sum + b.sum, fmaxf(a.largest, b.largest)};
  });
}

template <class T>
__device__ __forceinline__ float row_norm(const RowsView& grad, int64_t start) {
  const auto* row = static_cast<const typename T::Bits*>(grad.data) + start;
  LaneSquares<T> plain_squares;
  int64_t rest = lane_index();
  if (reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0) {
    rest = add_vectors<T>(row, grad.width, plain_squares);
  }
  add_groups<T>(row, grad.width, rest, 1.0f, plain_squares);
  const Squares plain = of_warp(plain_squares.total());
  const bool in_range = plain.sum >= kSmallestPlainSum && plain.sum <= kLargestPlainSum;
  // A sum that is out of range because of zeros, inf or NaN is right.
  const bool finite = !isnan(plain.sum) && isfinite(plain.largest);
  if (in_range || !finite || plain.largest == 0.0f) return __fsqrt_rn(plain.sum);

  const int exponent = static_cast<int>(__float_as_uint(plain.largest) >> 23) - 127;
  const int power = smaller(larger(exponent, -kLargestExponent), kLargestExponent);
  LaneSquares<T> scaled;
  add_groups<T>(row, grad.width, lane_index(), power_of_two(-power), scaled);
  return __fsqrt_rn(of_warp(scaled.total()).sum) * power_of_two(power);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    grad_norm_kernel(GradNormParams first, GradNormParams second, int64_t first_blocks) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  const bool is_first = block < first_blocks;
  const GradNormParams params = is_first ? first : second;
  const RowsView& grad = params.grad;
  const int64_t i = (is_first ? block : block - first_blocks) * kRowsPerBlock + warp_index();
  if (i >= grad.rows) return;

  const int64_t outer = i < grad.inner ? 0 : i / grad.inner;
  const int64_t start = outer * grad.outer_stride + (i - outer * grad.inner) * grad.inner_stride;
  float norm;
  if (grad.dtype == DType::kBFloat16) {
    norm = row_norm<BFloat16>(grad, start);
  } else if (grad.dtype == DType::kFloat16) {
    norm = row_norm<Float16>(grad, start);
  } else {
    norm = row_norm<Float32>(grad, start);
  }
  if (lane_index() == 0) params.norm[i] = norm;
}

int64_t blocks_of(const RowsView& grad) { return (grad.rows + kRowsPerBlock - 1) / kRowsPerBlock; }

// Describes equally spaced rows by one dimension, which saves the kernel a division.
GradNormParams collapsed(GradNormParams params) {
  RowsView& grad = params.grad;
  if (grad.outer_stride == grad.inner * grad.inner_stride) grad.inner = grad.rows;
  return params;
}

}  // namespace

int grad_norm(const GradNormParams& first, const GradNormParams* second, void* stream) {
  const int64_t first_blocks = blocks_of(first.grad);
  const int64_t blocks = first_blocks + (second == nullptr ? 0 : blocks_of(second->grad));
  if (blocks == 0) return cudaSuccess;
  const GradNormParams& other = second == nullptr ? first : *second;
  return launch(grad_norm_kernel, {blocks, kThreads}, stream, collapsed(first), collapsed(other),
                first_blocks);
}

}  // namespace leaf::cuda
