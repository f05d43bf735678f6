#pragma once

// Kernels for selftest.cu, each of which does one thing that no kernel may do.

#include "cuda/device.cuh"

namespace leaf::cuda {
namespace {

__global__ void barrier_in_branch() {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_exits() {
  if (threadIdx.x == 3) return;
  __syncwarp();
}

__global__ void whole_warp() {
  if (threadIdx.x >= 32) __syncwarp();
}

__global__ void mask_lacks_caller() { __shfl_sync(0xfffffffeu, 1, 1); }

__global__ void mask_lacks_source() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16);
}

__global__ void different_masks() {
  __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1, 20);
}

__global__ void bad_rank() { *in_block(dynamic_shared<int>(), cluster_size()) = 1; }

__global__ void rank_of_global(int* x) { *in_block(x, 0) = 1; }

__global__ void arrives_twice() {
  cluster_arrive();
  cluster_arrive();
}

__global__ void never_waits() { cluster_arrive(); }

__global__ void waits_first() { cluster_wait(); }

__global__ void reads_before_start(int* x) {
  *x = *in_block(dynamic_shared<int>(), cluster_size() - 1 - cluster_rank());
}

__global__ void beyond_dynamic() { dynamic_shared<int>()[threadIdx.x + 1] = 1; }

__global__ void beyond_static(int* x) {
  __shared__ int kept[8];
  kept[threadIdx.x + static_cast<unsigned>(*x)] = 1;
  *x = kept[threadIdx.x];
}

__global__ void beyond_global(int* x) { x[threadIdx.x + 1] = 1; }

__global__ void misaligned(uint4* x) {
  *x = *reinterpret_cast<uint4*>(dynamic_shared<unsigned char>() + 8);
}

__global__ void same_global(int* x) { *x = static_cast<int>(blockIdx.x); }

}  // namespace
}  // namespace leaf::cuda
