// to = from * factor. The factor is on the device, and the host does not wait for it. Scaling in
// place by 1, as in a plain loss.backward(), costs a launch and no memory traffic.

#include "leaf/scale.h"

#include "device.cuh"
#include "launch.cuh"
#include "logits.cuh"

namespace leaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 4;
constexpr int kGroupsPerBlock = kThreads * kGroupsPerThread;

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const ScaleParams params, const int blocks_per_row) {
  constexpr int N = kGroup<From>;
  const float factor = *params.factor;
  if (params.from == params.to && factor == 1.0f) return;
  const int64_t index = blockIdx.x / blocks_per_row;
  const int pad = row_pad<From>(params.from, index, params.from_row_stride);
  const Grouping<N> grouping{static_cast<int>(params.width), pad};
  const RowOf<From, N> from(params.from, index, params.from_row_stride, pad);
  const RowOf<To, N> to(params.to, index, params.to_row_stride, pad);
  const int begin = static_cast<int>(blockIdx.x % blocks_per_row) * kGroupsPerBlock;
  const int first = begin + static_cast<int>(threadIdx.x);

  Group<N> groups[kGroupsPerThread];  // all loads before the first store
#pragma unroll
  for (int i = 0; i < kGroupsPerThread; ++i) {
    const int g = first + i * kThreads;
    if (g < grouping.count()) groups[i] = from.read(grouping, g).unpacked();
  }
#pragma unroll
  for (int i = 0; i < kGroupsPerThread; ++i) {
    const int g = first + i * kThreads;
    if (g >= grouping.count()) continue;
#pragma unroll
    for (float& x : groups[i].x) x *= factor;
    to.write(grouping, g, groups[i]);
  }
}

template <class From, class To>
cudaError_t multiply(const ScaleParams& params, void* stream) {
  const int64_t groups = params.width / kGroup<From> + 2;  // the first and the last may be partial
  const int64_t blocks_per_row = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
  return launch(multiply_kernel<From, To>, {params.rows * blocks_per_row, kThreads}, stream, params,
                static_cast<int>(blocks_per_row));
}

}  // namespace

int scale(const ScaleParams& params, void* stream) {
  if (params.rows == 0 || params.width == 0) return cudaSuccess;
  return with_element(params.from_dtype, [&](auto from) {
    return with_element(params.to_dtype, [&](auto to) {
      return multiply<decltype(from), decltype(to)>(params, stream);
    });
  });
}

}  // namespace leaf::cuda
