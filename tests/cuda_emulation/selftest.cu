// Small kernels that are right, or wrong in one way each. `selftest NAME` runs one of them. The
// right ones return 0; test_cuda_emulation.py lists the report that is expected of each of the
// others.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cuda/block.cuh"
#include "cuda/device.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "selftest_faults.cuh"

namespace leaf::cuda {
namespace {

__device__ float warp_sum(float x) { return warp_reduce(x, plus<float>); }

enum class Exchange { kRight, kNoBarrier, kOneSlot, kNotWaited, kWritesEarly };

// Replaces each number of a cluster by the sum of all, which the blocks send each other. Another
// block may overwrite a number, because it has been signalled by the block that read it.
template <Exchange how>
__global__ void sum_kernel(float* x) {
  __shared__ Arrivals arrivals;
  __shared__ uint4 parts[8];
  __shared__ float warps[3];
  const int size = cluster_size();
  const int rank = cluster_rank();
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  if (thread == 0) expect(arrivals, sizeof(uint4) * static_cast<unsigned>(size));
  cluster_announce();
  float* first = x + blockIdx.x / size * size * threads;
  float sum = warp_sum(first[rank * threads + thread]);
  if (thread % kWarp == 0) warps[thread / kWarp] = sum;
  if (how != Exchange::kNoBarrier) __syncthreads();
  float* place = first + (rank + 1) % size * threads + thread;
  cluster_wait();
  if (how == Exchange::kWritesEarly) *place = 0.0f;
  if (thread < size) {
    const unsigned bits = __float_as_uint(warps[0] + warps[1] + warps[2]);
    uint4* part = &parts[how == Exchange::kOneSlot ? 0 : rank];
    send(part, make_uint4(bits, 0, 0, 0), arrivals, thread);
  }
  if (thread == 0 || how != Exchange::kNotWaited) wait(arrivals);
  sum = 0.0f;
  for (int i = 0; i < size; ++i) sum += __uint_as_float(parts[i].x);
  *place = sum;
}

template <Exchange how = Exchange::kRight>
int run_sum() {
  constexpr int kBlocks = 8;
  constexpr int kThreads = 96;
  for (const int cluster : {1, 2, 4, 8}) {
    std::vector<float> x(kBlocks * kThreads);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
    if (launch(sum_kernel<how>, {kBlocks, kThreads, 0, cluster}, nullptr, x.data()) !=
        cudaSuccess) {
      return 1;
    }
    const int size = cluster * kThreads;
    for (int i = 0; i < kBlocks * kThreads; ++i) {
      const int first = i / size * size;
      if (x[i] != static_cast<float>(size * first + size * (size - 1) / 2)) return 2;
    }
  }
  return 0;
}

// Launches from several CPU threads at the same time.
int run_threads() {
  int results[3];
  std::vector<std::thread> threads;
  for (int& result : results) threads.emplace_back([&result] { result = run_sum(); });
  for (std::thread& thread : threads) thread.join();
  return results[0] + results[1] + results[2];
}

template <class Pair>
__device__ unsigned word(const Pair& pair) {
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <class Pair>
__device__ unsigned larger(unsigned a, unsigned b) {
  return word(__hmax2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b)));
}

// All operations of a warp, on threads whose value is their number.
__global__ void warp_kernel(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto expect = [&](bool right) {
    if (!right) atomicAdd(wrong, 1);
  };
  expect(__shfl_sync(kFullMask, lane, 5) == 5);
  expect(__shfl_sync(kFullMask, 1.5f * lane, lane ^ 3) == 1.5f * (lane ^ 3));
  expect(__ballot_sync(kFullMask, lane % 2) == 0xaaaaaaaau);
  expect(__reduce_min_sync(kFullMask, 5 - lane) == -26);
  expect(__reduce_min_sync(kFullMask, 5u - static_cast<unsigned>(lane)) == 0);
  expect(__ffs(8) == 4 && __clz(1) == 31);
  if (lane < 16) {
    expect(__shfl_sync(0xffffu, lane, lane ^ 8) == (lane ^ 8));
  } else {
    expect(__shfl_sync(0xffff0000u, lane, lane ^ 8) == (lane ^ 8));
  }
  expect(larger<__half2>(0x3c00fe00u, 0xc000bc00u) == 0x3c00bc00u);         // NaN is ignored
  expect(larger<__nv_bfloat162>(0x80003f80u, 0x0000bf80u) == 0x00003f80u);  // +0 and 1
  expect(larger<__nv_bfloat162>(0xffc0ff80u, 0xffc0c000u) == 0x7fffc000u);  // NaN and -2
  expect(word(__floats2half2_rn(1.0f, -2.0f)) == 0xc0003c00u);
  expect(word(__floats2bfloat162_rn(1.0f, -2.0f)) == 0xc0003f80u);
  expect(__clusterIdx().x == blockIdx.x && __clusterIdx().y == blockIdx.y);
}

int run_warp() {
  int wrong = 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 3);
  config.blockDim = dim3(64);
  const cudaError_t error = cudaLaunchKernelEx(&config, warp_kernel, &wrong);
  return error == cudaSuccess ? wrong : 1;
}

// One block of a launch with an error.
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

// The first block reads and signals the second one, which signals the third one, which writes. One
// thread may wait for all threads of its block.
__global__ void passed_on(int* x, bool waits_first) {
  __shared__ Arrivals arrivals;
  __shared__ uint4 place;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) expect(arrivals, rank > 0 ? 16 : 0);
  cluster_announce();
  cluster_wait();
  if (rank == 0) x[1 + threadIdx.x] = *x;
  if (rank > 0 && waits_first && threadIdx.x == 0) wait(arrivals);
  __syncthreads();
  if (rank < 2 && threadIdx.x == 1) send(&place, make_uint4(7, 0, 0, 0), arrivals, rank + 1);
  if (threadIdx.x == 1) wait(arrivals);
  if (rank == 2 && threadIdx.x == 1) *x = static_cast<int>(place.x);
}

int run_passed_on(bool waits_first) {
  int x[3] = {5, 0, 0};
  return run(2, 0, 3, passed_on, x, waits_first) != 0 || x[0] != 7 || x[1] != 5 || x[2] != 5;
}

__global__ void unwritten(float* x) { *x = *dynamic_shared<float>(); }

int run_unwritten() {
  float x = 0.0f;
  const int error = run(1, 4, 1, unwritten, &x);
  return error != 0 ? error : isnan(x) ? 3 : 0;
}

// The first of two lanes passes a number to the second.
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

enum class Copied { kAllWait, kOneWaits, kFewWait, kNobodyWaits, kOverwritten };

// Reverses numbers in place, through shared memory.
__global__ void copied(uint4* x, Copied how) {
  __shared__ Arrivals arrivals;
  uint4* kept = dynamic_shared<uint4>();
  if (threadIdx.x == 0) expect(arrivals, 64 * sizeof(uint4));
  const auto* bytes = reinterpret_cast<const char*>(x);
  copy_to_shared(dynamic_shared<char>(), bytes, 48 * sizeof(uint4), arrivals);
  copy_to_shared(reinterpret_cast<char*>(kept + 48), bytes + 48 * sizeof(uint4), 16 * sizeof(uint4),
                 arrivals);
  __syncthreads();
  if (how == Copied::kOverwritten) x[63 - threadIdx.x].x = 0;
  const unsigned waiters[] = {64, 1, 32, 0, 64};
  if (threadIdx.x < waiters[static_cast<int>(how)]) wait_for_copies(arrivals);
  if (how == Copied::kOneWaits) __syncthreads();
  x[63 - threadIdx.x] = kept[threadIdx.x];
}

int run_copied(Copied how) {
  uint4 x[64];
  for (unsigned i = 0; i < 64; ++i) x[i] = make_uint4(i, 0, 0, i);
  if (run(64, sizeof x, 1, copied, x, how) != 0) return 1;
  for (unsigned i = 0; i < 64; ++i) {
    if (x[i].x != 63 - i || x[i].w != 63 - i) return 2;
  }
  return 0;
}

int run_copied_wrongly(unsigned first, unsigned bytes) {
  std::vector<uint4> x(2);
  return run(1, 64, 1, copied_wrongly, reinterpret_cast<const char*>(x.data()) + first, bytes);
}

__global__ void powers(float* x) { x[threadIdx.x] = exp2_fast(x[threadIdx.x]); }

// Tests that the error is the requested one, and equal in the next call.
int run_powers() {
  constexpr unsigned kCount = 512;
  const char* asked = std::getenv("LEAF_EMULATION_EXP2_ERROR");
  const double most = asked == nullptr ? 0.0 : std::atof(asked);
  float x[2][kCount];
  for (auto& row : x) {
    for (unsigned i = 0; i < kCount; ++i) row[i] = static_cast<float>(i) * -0.037f;
    row[kCount - 2] = -INFINITY;
    row[kCount - 1] = NAN;
    if (run(kCount, 0, 1, powers, row) != 0) return 1;
  }
  double largest = 0.0;
  for (unsigned i = 0; i < kCount - 2; ++i) {
    const double exact = std::exp2(static_cast<double>(static_cast<float>(i) * -0.037f));
    largest = std::fmax(largest, std::fabs(x[0][i] / exact - 1.0));
  }
  if (largest < 0.9 * most || largest > most + 1.2e-7) return 2;
  if (x[0][0] != 1.0f || x[0][kCount - 2] != 0.0f || !std::isnan(x[0][kCount - 1])) return 3;
  return std::memcmp(x[0], x[1], sizeof(x[0])) != 0 ? 4 : 0;
}

__global__ void nothing() {}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, 0);
  return value;
}

// Tests the host calls on the device that the environment selects.
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
  // A refused launch returns its error, and a later call does not see it.
  return std::strcmp(cudaGetErrorString(cudaGetLastError()), "no error") == 0 ? 0 : 11;
}

struct Case {
  const char* name;
  int (*run)();
};

const Case kCases[] = {
    {"sum", run_sum<>},
    {"threads", run_threads},
    {"warp", run_warp},
    {"reversed", [] { return run_reversed(true); }},
    {"handed", [] { return run_handed(true); }},
    {"counts", run_counts},
    {"passed_on", [] { return run_passed_on(true); }},
    {"copied", [] { return run_copied(Copied::kAllWait) + run_copied(Copied::kOneWaits); }},
    {"powers", run_powers},
    {"limits", run_limits},

    {"no_barrier", [] { return run_reversed(false); }},
    {"copies_not_waited_for", [] { return run_copied(Copied::kNobodyWaits); }},
    {"copies_waited_for_by_others", [] { return run_copied(Copied::kFewWait); }},
    {"copies_overwritten", [] { return run_copied(Copied::kOverwritten); }},
    {"passed_on_unheard", [] { return run_passed_on(false); }},
    {"sum_before_barrier", run_sum<Exchange::kNoBarrier>},
    {"sum_in_one_slot", run_sum<Exchange::kOneSlot>},
    {"sum_not_waited_for", run_sum<Exchange::kNotWaited>},
    {"sum_written_early", run_sum<Exchange::kWritesEarly>},
    {"expects_twice", [] { return run(1, 0, 1, expects_twice); }},
    {"expects_in_global",
     [] {
       static Arrivals x;
       return run(1, 0, 1, expects_in_global, &x);
     }},
    {"expected_by_nobody", [] { return run(1, 0, 1, expected_by_nobody); }},
    {"expected_by_another", [] { return run(2, 0, 1, expected_by_another); }},
    {"bytes_missing", [] { return run(1, sizeof(Sent), 1, bytes_missing); }},
    {"bytes_never_sent", [] { return run(1, sizeof(Sent), 1, bytes_never_sent); }},
    {"bytes_left_over", [] { return run(1, sizeof(Sent), 1, bytes_left_over); }},
    {"copies_odd_size", [] { return run_copied_wrongly(0, 24); }},
    {"copies_odd_address", [] { return run_copied_wrongly(8, 16); }},
    {"copies_beyond_global", [] { return run_copied_wrongly(16, 32); }},
    {"sends_before_start", [] { return run(1, sizeof(Sent), 2, sends_before_start); }},
    {"sends_before_barrier", [] { return run(1, sizeof(Sent), 2, sends_before_barrier); }},
    {"sends_after_end", [] { return run(1, sizeof(Sent), 2, sends_after_end); }},
    {"no_syncwarp", [] { return run_handed(false); }},
    {"barrier_in_branch", [] { return run(48, 0, 1, barrier_in_branch); }},
    {"two_barriers", [] { return run(32, 0, 1, two_barriers); }},
    {"lane_exits", [] { return run(32, 0, 1, lane_exits); }},
    {"partial_warp", [] { return run(33, 0, 1, whole_warp); }},
    {"mask_lacks_caller", [] { return run(32, 0, 1, mask_lacks_caller); }},
    {"mask_lacks_source", [] { return run(32, 0, 1, mask_lacks_source); }},
    {"different_masks", [] { return run(32, 0, 1, different_masks); }},
    {"bad_rank", [] { return run(1, sizeof(Sent), 2, bad_rank); }},
    {"arrives_twice", [] { return run(1, 0, 2, arrives_twice); }},
    {"never_waits", [] { return run(1, 0, 1, never_waits); }},
    {"waits_first", [] { return run(1, 0, 1, waits_first); }},
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
