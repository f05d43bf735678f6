#pragma once

// Replaces CUDA's header of this name when a host compiler compiles the kernels. It has only the
// part of CUDA that csrc/cuda uses. Functions that need the threads are in ../scheduler.cpp,
// functions that need the device in ../runtime.cpp.

#include <math.h>
#include <stddef.h>

#include <bit>
#include <cstdint>
#include <functional>
#include <source_location>
#include <type_traits>

#define LEAF_CUDA_EMULATION  // replaces the assembly of csrc/cuda/device.cuh

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// thread_local is used to place all shared variables of a program in one range of memory with a
// known extent. The range contains a block's variables whenever one of its threads runs.
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
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Numeric functions that <math.h> lacks.

inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
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

// Device calls. Those that wait record their caller for reports. They are inlined even without
// optimization, so that the kernel itself calls the emulation.

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace leaf::emulation {

using Where = std::source_location;
enum class Warp { kSync, kShuffle, kBallot, kMin };

unsigned block_rank();
unsigned blocks_in_cluster();
void sync_block(Where where);
void arrive_in_cluster(Where where);
void wait_for_cluster(Where where);
// One operation of a warp; `lane` is the source of a shuffle.
unsigned sync_warp(Warp operation, unsigned mask, unsigned value, int lane, Where where);
void note_atomic(const void* address, size_t size);

// Implements Arrivals of csrc/cuda/device.cuh. The waiting thread makes all accesses here, where
// the compiler instruments them, on behalf of the threads that requested them.
struct Transfer {
  uint4* to;
  const uint4* from;  // null if `value` is sent
  unsigned words;
  uint4 value;
};
void note_expected(const void* arrivals, unsigned bytes);
void copy(char* shared, const char* global, unsigned bytes, void* arrivals);
void send(uint4* to, uint4 value, void* arrivals, int rank);
void wait_for_bytes(const void* arrivals);
bool next_transfer(Transfer* transfer);  // the next of those that the thread has waited for

__forceinline__ void expect(void* arrivals, unsigned bytes) {
  note_expected(arrivals, bytes);
  *static_cast<uint64_t*>(arrivals) = bytes;
}
__forceinline__ void wait(void* arrivals) {
  wait_for_bytes(arrivals);
  Transfer now;
  while (next_transfer(&now)) {
    for (unsigned i = 0; i < now.words; ++i) now.to[i] = now.from ? now.from[i] : now.value;
  }
}

// Returns 2^x with the requested error (../approximate.cpp).
float exp2_nearly(float x);

// Not instrumented, so that the race build treats it as one atomic access.
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
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, LEAF_HERE) {
  return std::bit_cast<T>(::leaf::emulation::sync_warp(
      ::leaf::emulation::Warp::kShuffle, mask, std::bit_cast<unsigned>(value), lane, where));
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, LEAF_HERE) {
  return ::leaf::emulation::sync_warp(::leaf::emulation::Warp::kBallot, mask, predicate != 0, 0,
                                      where);
}
__forceinline__ unsigned __reduce_min_sync(unsigned mask, unsigned value, LEAF_HERE) {
  return ::leaf::emulation::sync_warp(::leaf::emulation::Warp::kMin, mask, value, 0, where);
}
__forceinline__ int __reduce_min_sync(unsigned mask, int value, LEAF_HERE) {
  constexpr unsigned kSign = 1u << 31;  // inverting it keeps the order
  const unsigned least = __reduce_min_sync(mask, static_cast<unsigned>(value) ^ kSign, where);
  return static_cast<int>(least ^ kSign);
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, LEAF_HERE) {
  ::leaf::emulation::sync_warp(::leaf::emulation::Warp::kSync, mask, 0, 0, where);
}
__forceinline__ void __syncthreads(LEAF_HERE) { ::leaf::emulation::sync_block(where); }
__forceinline__ void __cluster_barrier_arrive_relaxed(LEAF_HERE) {
  ::leaf::emulation::arrive_in_cluster(where);
}
__forceinline__ void __cluster_barrier_wait(LEAF_HERE) {
  ::leaf::emulation::wait_for_cluster(where);
}
#undef LEAF_HERE

inline unsigned __clusterRelativeBlockRank() { return ::leaf::emulation::block_rank(); }
inline unsigned __clusterSizeInBlocks() { return ::leaf::emulation::blocks_in_cluster(); }
inline uint3 __clusterIdx() { return {blockIdx.x / __clusterSizeInBlocks(), blockIdx.y, 0}; }

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ::leaf::emulation::atomic(address, [&](T old) { return static_cast<T>(old | value); });
}

// Host calls, with CUDA's numbers.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
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
// The kernels count as compiled for the device's architecture.
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
