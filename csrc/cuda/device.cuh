#pragma once

// Hardware features beyond plain CUDA C++, behind small functions. tests/cuda_emulation implements
// the same functions, so that a host compiler can compile the kernels.

#include <cuda_runtime.h>

#include <cstdint>

namespace leaf::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The dynamic shared memory of a launch as T. All kernels share one symbol.
extern __shared__ __align__(16) unsigned char leaf_dynamic_shared[];

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(leaf_dynamic_shared);
}

// Returns 2^x; subnormal results become 0.
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

// A barrier for bytes that arrive in a block's shared memory asynchronously: copies from memory and
// values sent by other blocks of the cluster. It is used once in a launch: `expect` states the
// number of bytes, `wait` returns when all have arrived. GPUs older than compute capability 9.0
// copy by threads and have no clusters: each block is a cluster of one.
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
// All threads of the cluster call cluster_announce and then cluster_wait, which returns when all
// have announced. Every block then runs and has made its `expect` calls, so that others may send to
// it.
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

// Called by one thread before the bytes are sent. Its block sees it after a barrier, other blocks
// after cluster_wait.
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

// Blocks the calling threads until all expected bytes have arrived.
__device__ __forceinline__ void wait(Arrivals& arrivals) {
  asm volatile(
      "{\n\t"
      ".reg .pred there;\n\t"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%0], 0;\n\t"
      "@!there bra again;\n\t"
      "}" ::"r"(shared_address(&arrivals))
      : "memory");
}

// Sends 16 bytes to the same address in the shared memory of another block of the cluster.
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

// Starts a copy to shared memory. All threads call it; addresses and size are multiples of 16.
__device__ __forceinline__ void copy_to_shared(char* shared, const char* global, unsigned bytes,
                                               Arrivals& arrivals) {
  if (threadIdx.x != 0 || bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(&arrivals))
      : "memory");
}

// Prefetches bytes into the L2 cache. One thread calls it, with the same alignment.
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
