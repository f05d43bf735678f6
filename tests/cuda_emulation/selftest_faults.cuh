#pragma once

// Kernels for selftest.cu, each with one error.

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
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16 + static_cast<int>(threadIdx.x));
}

__global__ void different_masks() {
  __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1, 20);
}

__global__ void arrives_twice() {
  cluster_announce();
  cluster_announce();
}

__global__ void never_waits() { cluster_announce(); }

__global__ void waits_first() { cluster_wait(); }

__global__ void expects_twice() {
  __shared__ Arrivals arrivals;
  expect(arrivals, 0);
  expect(arrivals, 0);
}

__global__ void expects_in_global(Arrivals* arrivals) { expect(*arrivals, 16); }

__global__ void expected_by_nobody() {
  __shared__ Arrivals arrivals;
  wait(arrivals);
}

__global__ void expected_by_another() {
  __shared__ Arrivals arrivals;
  if (threadIdx.x == 0) expect(arrivals, 0);
  __shfl_sync(3, 0, 0);
  if (threadIdx.x == 1) wait(arrivals);
}

// Sends 16 bytes to a block of the cluster.
struct Sent {
  Arrivals arrivals;
  uint4 place;
  __device__ void to(int rank) { send(&place, make_uint4(1, 2, 3, 4), arrivals, rank); }
};

__global__ void bytes_missing() {
  auto& sent = *dynamic_shared<Sent>();
  expect(sent.arrivals, 32);
  sent.to(0);
  wait(sent.arrivals);
}

__global__ void bytes_never_sent() { expect(dynamic_shared<Sent>()->arrivals, 16); }

__global__ void bytes_left_over() {
  auto& sent = *dynamic_shared<Sent>();
  expect(sent.arrivals, 16);
  sent.to(0);
  sent.to(0);
}

__global__ void copied_wrongly(const char* x, unsigned bytes) {
  __shared__ Arrivals arrivals;
  expect(arrivals, 32);
  copy_to_shared(dynamic_shared<char>(), x, bytes, arrivals);
  wait_for_copies(arrivals);
}

__global__ void sends_before_start() {
  expect(dynamic_shared<Sent>()->arrivals, 16);
  dynamic_shared<Sent>()->to(1 - cluster_rank());
}

__global__ void sends_before_barrier() {
  auto& sent = *dynamic_shared<Sent>();
  expect(sent.arrivals, 16);
  cluster_announce();
  if (cluster_rank() == 0) cluster_wait();
  sent.to(1 - cluster_rank());
  if (cluster_rank() == 1) cluster_wait();
  wait(sent.arrivals);
}

__global__ void sends_after_end() {
  cluster_announce();
  cluster_wait();
  if (cluster_rank() == 0) dynamic_shared<Sent>()->to(1);
}

__global__ void bad_rank() { dynamic_shared<Sent>()->to(cluster_size()); }

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
