#pragma once

// Stands in for CUDA's header of this name where a host compiler compiles the kernels: the part of
// CUDA that csrc/cuda uses and no more. What needs to know of threads is in ../scheduler.cpp, what
// needs to know of a device in ../runtime.cpp.

#include <math.h>
#include <stddef.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define LEAF_CUDA_EMULATION  // for what csrc/cuda/device.cuh writes in assembly

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Not for the threads: all shared variables of a program then lie in one place, whose extent can be
// asked for. There a block finds its own whenever one of its threads runs.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Functions on numbers; the rest is in <math.h>.

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
template <class T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
T max(T x, T y) {
  return x < y ? y : x;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

// Device calls. Those that wait know where they were called, for reports; they are inlined even
// where nothing is optimized, so that what calls the emulation is the kernel.

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace leaf::emulation {

using Where = std::source_location;
enum class Warp { kSync, kIndex, kXor, kUp, kDown, kBallot, kAny, kAll };

unsigned block_rank();
unsigned blocks_in_cluster();
void* map_to_rank(const void* address, int rank);
void sync_block(Where where);
void arrive_in_cluster(bool releases, Where where);
void wait_for_cluster(Where where);
// One operation of a warp; `operand` is a shuffle's lane, distance or mask.
uint64_t sync_warp(Warp operation, unsigned mask, uint64_t value, int operand, int width,
                   Where where);
void note_atomic(const void* address, size_t size);

template <class T>
__forceinline__ T shuffle(Warp operation, unsigned mask, T value, int operand, int width,
                          Where where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sync_warp(operation, mask, bits, operand, width, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Copies that a thread has asked for and not waited for. The two accesses are made here, where the
// compiler instruments them.
struct Copy {
  uint4* to;
  uint4 value;
};
void push_copy(const Copy& copy);
bool pop_copy(Copy* copy);

inline void copy_16_bytes_later(void* to, const void* from) {
  push_copy({static_cast<uint4*>(to), *static_cast<const uint4*>(from)});
}
inline void finish_copies() {
  Copy copy;
  while (pop_copy(&copy)) *copy.to = copy.value;
}

// Uninstrumented, so that the race build takes it for one access that no other can interrupt.
template <class T, class Update>
__attribute__((no_sanitize("thread"), noinline)) T atomic(T* address, const Update& update) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "a sum of floats has no fixed order");
  note_atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace leaf::emulation

#define LEAF_HERE ::leaf::emulation::Where where = ::leaf::emulation::Where::current()
#define LEAF_SHUFFLE(name, operation)                                                           \
  template <class T>                                                                            \
  __forceinline__ T name(unsigned mask, T value, int operand, int width = 32, LEAF_HERE) {      \
    return ::leaf::emulation::shuffle(::leaf::emulation::Warp::operation, mask, value, operand, \
                                      width, where);                                            \
  }
LEAF_SHUFFLE(__shfl_sync, kIndex)
LEAF_SHUFFLE(__shfl_xor_sync, kXor)
LEAF_SHUFFLE(__shfl_up_sync, kUp)
LEAF_SHUFFLE(__shfl_down_sync, kDown)
#define LEAF_VOTE(result, name, operation)                                                        \
  __forceinline__ result name(unsigned mask, int predicate, LEAF_HERE) {                          \
    return static_cast<result>(::leaf::emulation::sync_warp(::leaf::emulation::Warp::operation,   \
                                                            mask, predicate != 0, 0, 32, where)); \
  }
LEAF_VOTE(unsigned, __ballot_sync, kBallot)
LEAF_VOTE(int, __any_sync, kAny)
LEAF_VOTE(int, __all_sync, kAll)
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, LEAF_HERE) {
  ::leaf::emulation::sync_warp(::leaf::emulation::Warp::kSync, mask, 0, 0, 32, where);
}
__forceinline__ void __syncthreads(LEAF_HERE) { ::leaf::emulation::sync_block(where); }
__forceinline__ void __cluster_barrier_arrive(LEAF_HERE) {
  ::leaf::emulation::arrive_in_cluster(true, where);
}
__forceinline__ void __cluster_barrier_arrive_relaxed(LEAF_HERE) {
  ::leaf::emulation::arrive_in_cluster(false, where);
}
__forceinline__ void __cluster_barrier_wait(LEAF_HERE) {
  ::leaf::emulation::wait_for_cluster(where);
}
#undef LEAF_HERE
#undef LEAF_SHUFFLE
#undef LEAF_VOTE

inline unsigned __clusterRelativeBlockRank() { return ::leaf::emulation::block_rank(); }
inline unsigned __clusterSizeInBlocks() { return ::leaf::emulation::blocks_in_cluster(); }
__forceinline__ void* __cluster_map_shared_rank(const void* address, int rank) {
  return ::leaf::emulation::map_to_rank(address, rank);
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return static_cast<T>(old | value); });
}

// Host calls. The numbers are CUDA's.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

using cudaStream_t = struct CUstream_st*;
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

struct cudaFuncAttributes {
  int ptxVersion;
};
// What a kernel was compiled for is here what the device is.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  int major = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  attributes->ptxVersion = 10 * major;
  return error;
}

namespace leaf::emulation {
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& thread);
}  // namespace leaf::emulation

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return leaf::emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(P...),
                                           const cudaLaunchConfig_t* config) {
  return leaf::emulation::active_clusters(count, reinterpret_cast<const void*>(kernel), *config);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  return leaf::emulation::launch(
      reinterpret_cast<const void*>(kernel), *config,
      [kernel, ... values = P(static_cast<A&&>(arguments))] { kernel(values...); });
}
