#pragma once

// The part of a GPU that the kernels use beyond plain CUDA C++. What is hardware's own stands here
// behind small functions that tests/cuda_emulation has too, so that a host compiler can take the
// kernels.

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
#ifdef LEAF_CUDA_EMULATION
  const float result = emulation::exp2_nearly(x);
#else
  const float result = exp2f(x);
#endif
  return result < 0x1p-126f ? 0.0f : result;  // NaN stays
#endif
}

// Bytes that reach a block's shared memory without a thread of it that carries them: a copy from
// memory, and what other blocks of the cluster send. One use in a launch: `expect` says how many
// bytes come, `wait` returns when all are there. Older GPUs than compute capability 9.0 copy by
// threads, and have no clusters: there a block is one by itself.
struct alignas(8) Arrivals {
  uint64_t state;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__device__ __forceinline__ int cluster_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_announce() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void expect(Arrivals&, unsigned) {}
__device__ __forceinline__ void wait(Arrivals&) {}
__device__ __forceinline__ void send(uint4*, uint4, Arrivals&, int) {}
__device__ __forceinline__ void prefetch(const void*, unsigned) {}

__device__ __forceinline__ void copy_to_shared(char* shared, const char* global, unsigned bytes,
                                               Arrivals&) {
  for (unsigned i = 16 * threadIdx.x; i < bytes; i += 16 * blockDim.x) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global + i)
                 : "memory");
  }
}
__device__ __forceinline__ void wait_for_copies(Arrivals&) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}
#else
__device__ __forceinline__ int cluster_index() { return static_cast<int>(__clusterIdx().x); }
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(__clusterRelativeBlockRank());
}
__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
// All threads of the cluster's blocks announce themselves, then wait until all have: from then on
// each of these blocks runs and has made its `expect` calls, so that it can be sent something.
__device__ __forceinline__ void cluster_announce() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }

#ifdef LEAF_CUDA_EMULATION
__device__ __forceinline__ void expect(Arrivals& arrivals, unsigned bytes) {
  emulation::expect(&arrivals, bytes);
}
__device__ __forceinline__ void wait(Arrivals& arrivals) { emulation::wait(&arrivals); }
__device__ __forceinline__ void send(uint4* to, uint4 value, Arrivals& arrivals, int rank) {
  emulation::send(to, value, &arrivals, rank);
}
__device__ __forceinline__ void copy_to_shared(char* shared, const char* global, unsigned bytes,
                                               Arrivals& arrivals) {
  if (threadIdx.x == 0 && bytes > 0) emulation::copy(shared, global, bytes, &arrivals);
}
__device__ __forceinline__ void prefetch(const void*, unsigned) {}
#else
__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// By one thread, before the bytes are on their way. Others of the block see it after a barrier,
// other blocks after cluster_wait.
__device__ __forceinline__ void expect(Arrivals& arrivals, unsigned bytes) {
  const unsigned address = shared_address(&arrivals);
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;\n\t"
      "fence.proxy.async.shared::cta;\n\t"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address),
      "r"(bytes)
      : "memory");
}

// Returns when all expected bytes are there, to the threads that call it.
__device__ __forceinline__ void wait(Arrivals& arrivals) {
  asm volatile(
      "{\n\t"
      ".reg .pred there;\n\t"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%0], 0;\n\t"
      "@!there bra again;\n\t"
      "}" ::"r"(shared_address(&arrivals))
      : "memory");
}

// 16 bytes to the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ void send(uint4* to, uint4 value, Arrivals& arrivals, int rank) {
  unsigned place, signal;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(signal)
      : "r"(shared_address(&arrivals)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(place),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(signal)
      : "memory");
}

// Starts a copy to shared memory; all threads call it. Addresses and size are multiples of 16.
__device__ __forceinline__ void copy_to_shared(char* shared, const char* global, unsigned bytes,
                                               Arrivals& arrivals) {
  if (threadIdx.x != 0 || bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(&arrivals))
      : "memory");
}

// Brings bytes to the L2 cache, where later reads find them; by one thread, and as above.
__device__ __forceinline__ void prefetch(const void* global, unsigned bytes) {
  if (bytes == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
}
#endif
__device__ __forceinline__ void wait_for_copies(Arrivals& arrivals) { wait(arrivals); }
#endif

}  // namespace leaf::cuda
