// to = from * factor. The factor lies on the device, and nothing waits for it: a gradient that is
// scaled in place by 1, as by a plain loss.backward(), costs a launch and no traffic.

#include "leaf/scale.h"

#include "device.cuh"
#include "launch.cuh"
#include "logits.cuh"

namespace leaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 4;
constexpr int kGroupsPerBlock = kThreads * kGroupsPerThread;

__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const ScaleParams params, const int blocks_per_row) {
  const float factor = *params.factor;
  if (params.from == params.to && factor == 1.0f) return;
  const int64_t index = blockIdx.x / blocks_per_row;
  const int pad = row_pad(params.from, params.from_dtype, index, params.from_row_stride);
  const Grouping grouping{static_cast<int>(params.width), pad};
  const RowOf<AnyElement> from(params.from, params.from_dtype, index, params.from_row_stride, pad);
  const RowOf<AnyElement> to(params.to, params.to_dtype, index, params.to_row_stride, pad);
  const int begin = static_cast<int>(blockIdx.x % blocks_per_row) * kGroupsPerBlock;
  const int first = begin + static_cast<int>(threadIdx.x);

  Group groups[kGroupsPerThread];  // all loads before the first store
#pragma unroll
  for (int i = 0; i < kGroupsPerThread; ++i) {
    const int g = first + i * kThreads;
    if (g < grouping.count()) groups[i] = read_group(from, grouping, g);
  }
#pragma unroll
  for (int i = 0; i < kGroupsPerThread; ++i) {
    const int g = first + i * kThreads;
    if (g >= grouping.count()) continue;
#pragma unroll
    for (float& x : groups[i].x) x *= factor;
    write_group(to, grouping, g, groups[i]);
  }
}

}  // namespace

int scale(const ScaleParams& params, void* stream) {
  if (params.rows == 0 || params.width == 0) return cudaSuccess;
  const int64_t groups =
      params.width / kGroup + 2;  // also where the first and the last are partial
  const int64_t blocks_per_row = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
  return launch(multiply_kernel, {params.rows * blocks_per_row, kThreads}, stream, params,
                static_cast<int>(blocks_per_row));
}

}  // namespace leaf::cuda
