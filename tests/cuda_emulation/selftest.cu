// Small kernels that are right, and that are wrong in one way each: `selftest NAME` runs one of
// them. The right ones end with 0; of the others test_cuda_emulation.py says what must be reported.

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "selftest_faults.cuh"

namespace leaf::cuda {
namespace {

__device__ float warp_sum(float x) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kFullMask, x, apart);
  return x;
}

// The sum of what the threads of a cluster's blocks hold.
template <bool with_barriers>
__device__ float cluster_sum(float x, float* parts) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) parts[warp] = x;
  cluster_arrive();
  cluster_wait();
  float total = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    for (int i = 0; i < warps; ++i) total += in_block(parts, rank)[i];
  }
  if (with_barriers) {  // the others still read
    cluster_arrive();
    cluster_wait();
  }
  return total;
}

template <bool with_barriers>
__global__ void sum_kernel(const float* x, float* sums) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  sums[i] = cluster_sum<with_barriers>(x[i], dynamic_shared<float>());
}

template <bool with_barriers>
int run_sum() {
  constexpr int kBlocks = 8;
  constexpr int kThreads = 96;
  std::vector<float> x(kBlocks * kThreads);
  std::vector<float> sums(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (const int cluster : {1, 2, 4, 8}) {
    const size_t bytes = kThreads / kWarp * sizeof(float);
    if (launch(sum_kernel<with_barriers>, {kBlocks, kThreads, bytes, cluster}, nullptr, x.data(),
               sums.data()) != cudaSuccess) {
      return 1;
    }
    const int size = cluster * kThreads;
    for (int i = 0; i < kBlocks * kThreads; ++i) {
      const int first = i / size * size;
      if (sums[i] != static_cast<float>(size * first + size * (size - 1) / 2)) return 2;
    }
  }
  return 0;
}

// Launches from several threads of the CPU at once.
int run_threads() {
  int results[3];
  std::vector<std::thread> threads;
  for (int& result : results) threads.emplace_back([&result] { result = run_sum<true>(); });
  for (std::thread& thread : threads) thread.join();
  return results[0] + results[1] + results[2];
}

// Everything that a warp can do, on threads that hold their own number.
__global__ void warp_kernel(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto expect = [&](bool right) {
    if (!right) atomicAdd(wrong, 1);
  };
  expect(__shfl_sync(kFullMask, lane, 5) == 5);
  expect(__shfl_sync(kFullMask, lane, lane + 1, 8) == lane / 8 * 8 + (lane + 1) % 8);
  expect(__shfl_xor_sync(kFullMask, 1.5 * lane, 3) == 1.5 * (lane ^ 3));
  expect(__shfl_up_sync(kFullMask, 1ull << lane, 2) == 1ull << (lane < 2 ? lane : lane - 2));
  expect(__shfl_down_sync(kFullMask, -lane, 4) == -(lane > 27 ? lane : lane + 4));
  expect(__ballot_sync(kFullMask, lane % 2) == 0xaaaaaaaau);
  expect(__any_sync(kFullMask, lane == 31) && !__any_sync(kFullMask, lane == 32));
  expect(__all_sync(kFullMask, lane < 32) && !__all_sync(kFullMask, lane < 31));
  expect(__brev(1u) == 0x80000000u && __ffs(8) == 4 && __clz(1) == 31 && __popc(7) == 3);
  if (lane < 16) {
    expect(__shfl_xor_sync(0xffffu, lane, 8) == (lane ^ 8));
  } else {
    expect(__shfl_xor_sync(0xffff0000u, lane, 8) == (lane ^ 8));
  }
  expect(blockIdx.y == 2 || atomicMax(wrong, 0) == 0);
}

int run_warp() {
  int wrong = 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 3);
  config.blockDim = dim3(64);
  const cudaError_t error = cudaLaunchKernelEx(&config, warp_kernel, &wrong);
  return error == cudaSuccess ? wrong : 1;
}

// One block of a launch that does what is wrong.
template <class... Parameters, class... Arguments>
int run(int threads, size_t bytes, int cluster, void (*kernel)(Parameters...),
        const Arguments&... arguments) {
  return launch(kernel, {cluster, threads, bytes, cluster}, nullptr, arguments...) == cudaSuccess
             ? 0
             : 1;
}

__global__ void reversed(float* x, bool with_barrier) {
  __shared__ float kept[64];
  kept[threadIdx.x] = x[threadIdx.x];
  if (with_barrier) __syncthreads();
  x[threadIdx.x] = kept[63 - threadIdx.x];
}

int run_reversed(bool with_barrier) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
  if (run(64, 0, 1, reversed, x, with_barrier) != 0) return 1;
  for (int i = 0; i < 64; ++i) {
    if (x[i] != static_cast<float>(63 - i)) return 2;
  }
  return 0;
}

// The first block writes to the second one.
__global__ void written(int* x, bool releases) {
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 0) *in_block(dynamic_shared<int>(), 1) = 7;
  releases ? cluster_arrive() : cluster_announce();
  cluster_wait();
  if (cluster_rank() == 1) *x = *dynamic_shared<int>();
}

int run_written(bool releases) {
  int x = 0;
  return run(1, 4, 2, written, &x, releases) != 0 || x != 7;
}

__global__ void unwritten(float* x) { *x = *dynamic_shared<float>(); }

int run_unwritten() {
  float x = 0.0f;
  const int error = run(1, 4, 1, unwritten, &x);
  return error != 0 ? error : isnan(x) ? 3 : 0;
}

// Two lanes of a warp, the first hands the second a number.
__global__ void handed(int* x, bool with_barrier) {
  int* kept = dynamic_shared<int>();
  if (threadIdx.x == 0) *kept = 7;
  if (with_barrier) __syncwarp();
  __shfl_sync(kFullMask, 0, 0);
  if (threadIdx.x == 1) *x = *kept;
}

int run_handed(bool with_barrier) {
  int x = 0;
  const int error = run(32, 4, 1, handed, &x, with_barrier);
  return error != 0 || x != 7;
}

__global__ void counts(unsigned* x) { atomicAdd(x, 1); }

int run_counts() {
  unsigned x = 0;
  return run(64, 0, 4, counts, &x) != 0 || x != 256;
}

__global__ void copied(uint4* x, bool wait) {
  uint4* kept = dynamic_shared<uint4>();
  copy_16_bytes(kept, x);
  if (wait) wait_for_copies();
  x->x = kept->x + 1;
}

int run_copied(bool wait) {
  uint4 x{1, 2, 3, 4};
  return run(1, 16, 1, copied, &x, wait) != 0 || x.x != 2;
}

__global__ void nothing() {}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, 0);
  return value;
}

// What is asked of the host's calls, on whatever device the environment names.
int run_limits() {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  if (run(1025, 0, 1, nothing) == 0 || run(0, 0, 1, nothing) == 0) return 1;
  if (launch(nothing, {0, 32}, nullptr) == cudaSuccess) return 2;
  if (run(32, 48 << 10, 1, nothing) != 0 || run(32, (48 << 10) + 1, 1, nothing) == 0) return 3;
  constexpr auto kShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(nothing, kShared, most + 1) == cudaSuccess) return 4;
  if (cudaFuncSetAttribute(nothing, kShared, most) != cudaSuccess) return 5;
  if (run(32, static_cast<size_t>(most), 1, nothing) != 0) return 6;
  if ((run(32, 0, 8, nothing) == 0) != clusters || run(32, 0, 16, nothing) == 0) return 7;
  if (launch(nothing, {6, 32, 0, 4}, nullptr) == cudaSuccess) return 8;
  constexpr auto kAny = cudaFuncAttributeNonPortableClusterSizeAllowed;
  if (cudaFuncSetAttribute(nothing, kAny, 1) != cudaSuccess) return 9;
  if ((run(32, 0, 16, nothing) == 0) != clusters) return 10;
  // A launch that was refused has said so; nobody finds its error again.
  return std::strcmp(cudaGetErrorString(cudaGetLastError()), "no error") == 0 ? 0 : 11;
}

struct Case {
  const char* name;
  int (*run)();
};

const Case kCases[] = {
    {"sum", run_sum<true>},
    {"threads", run_threads},
    {"warp", run_warp},
    {"reversed", [] { return run_reversed(true); }},
    {"handed", [] { return run_handed(true); }},
    {"counts", run_counts},
    {"copied", [] { return run_copied(true); }},
    {"written", [] { return run_written(true); }},
    {"limits", run_limits},

    {"no_last_barrier", run_sum<false>},
    {"no_barrier", [] { return run_reversed(false); }},
    {"no_wait_for_copies", [] { return run_copied(false); }},
    {"no_syncwarp", [] { return run_handed(false); }},
    {"barrier_in_branch", [] { return run(48, 0, 1, barrier_in_branch); }},
    {"two_barriers", [] { return run(32, 0, 1, two_barriers); }},
    {"lane_exits", [] { return run(32, 0, 1, lane_exits); }},
    {"partial_warp", [] { return run(33, 0, 1, whole_warp); }},
    {"mask_lacks_caller", [] { return run(32, 0, 1, mask_lacks_caller); }},
    {"mask_lacks_source", [] { return run(32, 0, 1, mask_lacks_source); }},
    {"different_masks", [] { return run(32, 0, 1, different_masks); }},
    {"bad_rank", [] { return run(1, 4, 2, bad_rank); }},
    {"rank_of_global",
     [] {
       static int x = 0;
       return run(1, 0, 1, rank_of_global, &x);
     }},
    {"arrives_twice", [] { return run(1, 0, 2, arrives_twice); }},
    {"never_waits", [] { return run(1, 0, 1, never_waits); }},
    {"waits_first", [] { return run(1, 0, 1, waits_first); }},
    {"reads_before_start",
     [] {
       int x = 0;
       return run(1, 4, 2, reads_before_start, &x);
     }},
    {"beyond_dynamic", [] { return run(32, 32 * sizeof(int), 1, beyond_dynamic); }},
    {"beyond_static",
     [] {
       int x = 8;
       return run(1, 0, 1, beyond_static, &x);
     }},
    {"beyond_global",
     [] {
       std::vector<int> x(32);
       return run(32, 0, 1, beyond_global, x.data());
     }},
    {"misaligned",
     [] {
       uint4 x;
       return run(1, 32, 1, misaligned, &x);
     }},
    {"unwritten", run_unwritten},
    {"no_release", [] { return run_written(false); }},
    {"same_global",
     [] {
       int x = 0;
       return run(1, 0, 2, same_global, &x);
     }},
};

}  // namespace
}  // namespace leaf::cuda

int main(int, char** arguments) {
  for (const auto& [name, run] : leaf::cuda::kCases) {
    if (std::strcmp(name, arguments[1]) != 0) continue;
    const int result = run();
    if (result != 0) std::fprintf(stderr, "%s: wrong (%d)\n", name, result);
    return result;
  }
  std::fprintf(stderr, "there is no case %s\n", arguments[1]);
  return 100;
}
