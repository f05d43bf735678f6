#pragma once

// The part of a GPU that the kernels use beyond plain CUDA C++. What is hardware's own stands here
// behind small functions with a plain fallback, so that a host compiler can take the kernels too.

#include <cuda_runtime.h>

#include <cstdint>

namespace leaf::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// A launcher's dynamic shared memory: one symbol for all kernels, as T.
extern __shared__ __align__(16) unsigned char leaf_dynamic_shared[];

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(leaf_dynamic_shared);
}

// 2^x, subnormal results flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;  // NaN stays
#endif
}

// Starts a copy of 16 bytes to shared memory; both addresses are multiples of 16. The thread that
// asked sees them after wait_for_copies(). The emulation of tests/cuda_emulation copies no earlier.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
#ifdef LEAF_CUDA_EMULATION
  emulation::copy_16_bytes_later(shared, global);
#elif defined(__CUDA_ARCH__)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifdef LEAF_CUDA_EMULATION
  emulation::finish_copies();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Thread-block clusters, from compute capability 9.0 on; elsewhere a block is a cluster by itself.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_announce() {}
__device__ __forceinline__ void cluster_arrive() { __syncthreads(); }
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int) {
  return shared;
}
#else
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(__clusterRelativeBlockRank());
}
__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
// All threads of the cluster's blocks arrive, then wait; what they wrote before they arrived, to
// shared memory of any of the blocks too, is seen after the wait.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
// Arrives without showing anything written: the others only learn that this block runs.
__device__ __forceinline__ void cluster_announce() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
#endif

}  // namespace leaf::cuda
