#pragma once

// Kernels over all rows of a loss, of one block each: before the rows the scale of a float16
// gradient, after them the sum of the loss. `Params` is a loss's parameters.

#include "block.cuh"
#include "leaf/dtype.h"

namespace leaf::cuda {

constexpr int kFinishThreads = 1024;

// Computes the power of two that scales the largest possible entry of a float16 gradient into
// (2^14, 2^15]: below overflow and as far from underflow as possible.
template <class Params>
__global__ void __launch_bounds__(kFinishThreads) scale_kernel(const Params params) {
  __shared__ float warps[kMaxWarps];
  float most = 0.0f;
  for (int64_t i = threadIdx.x; i < params.rows; i += blockDim.x) {
    most = fmaxf(most, fabsf(params.row_weight[i]));
  }
  most = block_reduce(
             most, [](float a, float b) { return fmaxf(a, b); }, warps) *
         (params.temperature * params.student.scale * params.slope_bound);
  if (threadIdx.x != 0) return;
  const int bits = __float_as_int(most);
  const int ceiling = (bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);  // of log2(most)
  const int exponent = min(max(15 - ceiling, -126), 126);
  const bool sound = most > 0.0f && most < INFINITY;
  *params.grad_scale = sound ? __int_as_float((exponent + 127) << 23) : 1.0f;
}

// Sums the divergences of the rows to the loss, in float64 and in a fixed order.
template <class Params>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const Params params, const float* row_kl) {
  __shared__ double warps[kMaxWarps];
  double loss = 0.0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    loss += static_cast<double>(params.row_weight[row]) * row_kl[row];
  }
  loss = block_reduce(loss, [](double a, double b) { return a + b; }, warps);
  if (threadIdx.x != 0) return;
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
  if (params.grad == nullptr || params.grad_dtype != DType::kFloat16) *params.grad_scale = 1.0f;
}

}  // namespace leaf::cuda
