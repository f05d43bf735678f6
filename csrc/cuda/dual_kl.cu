// loss = T^2 sum_i w_i KL(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum, d = sum_v exp((y - m) / T) and p = exp((y - m) / T) / d:
//
//     l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
//     KL   = sum_v p_s - p_t + p_t l
//     grad = w T (p_s - p_t) dy_s/dz_s
//
// Where l is small, p_s - p_t = p_t (phi - l) and the term of the sum is p_t phi, with
// phi = exp(-l) - 1 + l >= 0 by its series, so that nothing cancels. The maxima are subtracted
// first, so that an offset between the two models costs no digits.
//
// A cluster of thread blocks holds a row pair in its shared memory, a slice in each block: a logit
// is read from memory once, and threads read back only what they copied themselves. The blocks
// exchange maxima and sums once, in a fixed order; what they sum up afterwards they leave in
// scratch memory, and a second, small launch adds it. Where no cluster can hold a row, one block
// streams it twice.

#include "leaf/dual_kl.h"

#include <algorithm>

#include "block.cuh"
#include "device.cuh"
#include "dual_kl_row.cuh"
#include "launch.cuh"
#include "leaf/cuda.h"
#include "logits.cuh"

namespace leaf::cuda {
namespace {

constexpr int kMaxCluster = 16;      // from compute capability 9.0 on
constexpr int kPortableCluster = 8;  // each of these GPUs can run so many blocks as a cluster
constexpr int kRowWarps = kStreamedThreads / kWarp;  // at most
constexpr int kFinishThreads = 1024;
// Blocks that share a multiprocessor, so that one computes while another one waits for memory. With
// measures the registers suffice for two.
constexpr int kBlocksPerMultiprocessor = 3;

struct Scratch {
  float* sums;  // [3 with measures, else 1, rows, cluster]
  int cluster;
};

template <bool kMeasures>
struct alignas(16) Shared {
  Part<kMeasures> warps[kRowWarps];
  Part<kMeasures> blocks[kMaxCluster];
  Sums sums[kRowWarps];
};

// All blocks of a cluster learn what all of them know, merged in the order of their ranks. The
// first wait belongs to cluster_announce in rows_kernel: shared memory of a block must not be
// written to before the block runs.
template <class Shared, class Part, class Merge>
__device__ __forceinline__ Part exchange(Shared& shared, const Part& mine, const Merge& merge) {
  const int size = cluster_size();
  cluster_wait();
  if (static_cast<int>(threadIdx.x) < size) {
    *in_block(&shared.blocks[cluster_rank()], static_cast<int>(threadIdx.x)) = mine;
  }
  cluster_arrive();
  cluster_wait();
  const int lane = lane_index();
  return warp_reduce(shared.blocks[lane < size ? lane : 0], merge, size);
}

template <bool kMeasures>
__device__ __forceinline__ void store_sums(const Sums& sums, const Scratch& scratch, int64_t rows,
                                           int64_t row, int rank) {
  float* to = scratch.sums + row * scratch.cluster + rank;
  const int64_t step = rows * scratch.cluster;
  to[0] = sums.kl;
  if constexpr (kMeasures) {
    to[step] = sums.student_entropy;
    to[2 * step] = sums.teacher_entropy;
  }
}

template <class E, bool kHeld, bool kMeasures>
__global__ void __launch_bounds__(kHeld ? kHeldThreads : kStreamedThreads,
                                  kHeld && !kMeasures ? kBlocksPerMultiprocessor : 2)
    rows_kernel(const DualKLParams params, const Scratch scratch, const int64_t held_groups) {
  const int size = kHeld ? cluster_size() : 1;
  const int rank = kHeld ? cluster_rank() : 0;
  const int64_t index = blockIdx.x / size;
  const float weight = params.row_weight[index];
  if (weight == 0.0f) {
    if (threadIdx.x == 0) {
      store_sums<kMeasures>(Sums{}, scratch, params.rows, index, rank);
      if (kMeasures && rank == 0) params.row_results[3 * params.rows + index] = 0.0f;
    }
    if (params.grad == nullptr) return;
    const int64_t bytes = size_of(params.grad_dtype);
    zero_bytes(static_cast<char*>(params.grad) + index * params.grad_row_stride * bytes,
               params.student.vocab * bytes, rank * blockDim.x + threadIdx.x, size * blockDim.x);
    return;
  }
  if (size > 1) cluster_announce();

  auto& shared = *dynamic_shared<Shared<kMeasures>>();
  Row<E, kHeld, kMeasures> row(params, index, held_groups, reinterpret_cast<char*>(&shared + 1));
  const auto merge = [&](const auto& a, const auto& b) { return row.merged(a, b); };
  if constexpr (kHeld) row.copy();
  Part<kMeasures> part = block_reduce(row.part(), merge, shared.warps);
  if (size > 1) part = exchange(shared, part, merge);

  float factor = weight * params.temperature * params.student.scale;
  if (params.grad_dtype == DType::kFloat16) factor *= *params.grad_scale;
  const auto add = [](const Sums& a, const Sums& b) { return a + b; };
  const Sums sums = block_reduce(row.terms(part, factor), add, shared.sums);
  row.zero_rest();
  if (threadIdx.x != 0) return;
  store_sums<kMeasures>(sums, scratch, params.rows, index, rank);
  if constexpr (kMeasures) {
    const bool agree = part.student_top.place() == part.teacher_top.place();
    if (rank == 0) params.row_results[3 * params.rows + index] = agree ? 1.0f : 0.0f;
  }
}

// The power of two that brings the largest possible entry of a float16 gradient, |p_s - p_t| being
// at most 1, into (2^14, 2^15]: below its overflow, and as far from its underflow as can be.
__global__ void __launch_bounds__(kFinishThreads)
    scale_kernel(const float* row_weight, int64_t rows, float bound, float* grad_scale) {
  __shared__ float warps[kMaxWarps];
  float most = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) most = fmaxf(most, fabsf(row_weight[i]));
  most = block_reduce(most, [](float a, float b) { return fmaxf(a, b); }, warps) * bound;
  if (threadIdx.x != 0) return;
  const int bits = __float_as_int(most);
  const int ceiling = (bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);  // of log2(most)
  const int exponent = min(max(15 - ceiling, -126), 126);
  const bool sound = most > 0.0f && most < INFINITY;
  *grad_scale = sound ? __int_as_float((exponent + 127) << 23) : 1.0f;
}

// Sums up what the blocks left of each row, and the rows: in float64, in a fixed order.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const DualKLParams params, const Scratch scratch, bool measures) {
  __shared__ double warps[kMaxWarps];
  double loss = 0.0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    const double weight = params.row_weight[row];
    for (int quantity = 0; quantity < (measures ? 3 : 1); ++quantity) {
      const float* parts = scratch.sums + (quantity * params.rows + row) * scratch.cluster;
      double total = 0.0;  // of a dropped row 0
      for (int i = 0; i < scratch.cluster; ++i) total += parts[i];
      if (quantity == 0) loss += weight * total;
      if (measures) params.row_results[quantity * params.rows + row] = static_cast<float>(total);
    }
    if (measures) {
      float* agreement = params.row_results + 3 * params.rows + row;
      const float kl = params.row_results[row];
      if (isnan(kl)) *agreement = kl;
    }
  }
  loss = block_reduce(loss, [](double a, double b) { return a + b; }, warps);
  if (threadIdx.x != 0) return;
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
  if (params.grad == nullptr || params.grad_dtype != DType::kFloat16) *params.grad_scale = 1.0f;
}

// How a row is laid out on the device.
struct Plan {
  bool held;
  int cluster;
  int64_t groups;  // of a block
  size_t shared_bytes;

  Launch launch(int64_t rows) const {
    return {rows * cluster, held ? kHeldThreads : kStreamedThreads, shared_bytes, cluster};
  }
};

int attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

template <bool kMeasures>
Plan held_by(const DualKLParams& params, int cluster) {
  const int64_t pad = 16 / size_of(params.student.dtype) - 1;
  const int64_t groups = (common_vocab(params) + pad + kGroup - 1) / kGroup;
  const int64_t share = (groups + cluster - 1) / cluster;
  const int64_t bytes = kGroup * (size_of(params.student.dtype) + size_of(params.teacher.dtype));
  return {true, cluster, share, sizeof(Shared<kMeasures>) + static_cast<size_t>(share * bytes)};
}

// The smallest cluster with room for three blocks on a multiprocessor; else the largest one with
// room for two; else one block that streams the row.
template <bool kMeasures>
Plan make_plan(const DualKLParams& params, int largest_cluster) {
  constexpr size_t kReserved = 1024;  // of each block, by the system
  const auto most = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const auto whole = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const size_t roomy = whole / kBlocksPerMultiprocessor - kReserved;
  Plan best{false, 1, 0, sizeof(Shared<kMeasures>)};
  for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
    const Plan plan = held_by<kMeasures>(params, cluster);
    // Where a multiprocessor had room for one block alone, nothing would hide its waiting.
    if (plan.shared_bytes > std::min(most, whole / 2 - kReserved)) continue;
    best = plan;
    if (plan.shared_bytes <= roomy) break;
  }
  return best;
}

// The kernel with the shared memory and the cluster size of its plan.
template <class E, bool kHeld, bool kMeasures>
cudaError_t permit(const Plan& plan) {
  const auto kernel = rows_kernel<E, kHeld, kMeasures>;
  // The same in all calls: another thread may launch the kernel between this and our launch.
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && kHeld) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && plan.cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return reported(error);
}

template <class E, bool kHeld, bool kMeasures>
cudaError_t launch_rows(const DualKLParams& params, const Plan& plan, float* sums, void* stream) {
  const cudaError_t error = permit<E, kHeld, kMeasures>(plan);
  if (error != cudaSuccess) return error;
  return launch(rows_kernel<E, kHeld, kMeasures>, plan.launch(params.rows), stream, params,
                Scratch{sums, plan.cluster}, plan.groups);
}

template <class E, bool kMeasures>
Plan plan_for(const DualKLParams& params) {
  // Of the code that runs: a newer GPU may run what was compiled for an older one.
  cudaFuncAttributes compiled{};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, rows_kernel<E, true, kMeasures>);
  const bool clusters = reported(error) == cudaSuccess && compiled.ptxVersion >= 90;
  const Plan plan = make_plan<kMeasures>(params, clusters ? kMaxCluster : 1);
  if (plan.cluster <= kPortableCluster) return plan;
  const bool runs = permit<E, true, kMeasures>(plan) == cudaSuccess &&
                    fits(rows_kernel<E, true, kMeasures>, plan.launch(params.rows));
  return runs ? plan : make_plan<kMeasures>(params, kPortableCluster);
}

template <bool kMeasures>
cudaError_t run(const DualKLParams& params, float* scratch, void* stream) {
  const Launch alone{1, kFinishThreads};
  cudaError_t error = cudaSuccess;
  if (params.grad != nullptr && params.grad_dtype == DType::kFloat16) {
    error = launch(scale_kernel, alone, stream, params.row_weight, params.rows,
                   params.temperature * params.student.scale, params.grad_scale);
    if (error != cudaSuccess) return error;
  }
  int cluster = 1;
  if (params.rows > 0) {
    const auto start = [&](auto element) {
      using E = decltype(element);
      const Plan plan = plan_for<E, kMeasures>(params);
      cluster = plan.cluster;
      return plan.held ? launch_rows<E, true, kMeasures>(params, plan, scratch, stream)
                       : launch_rows<E, false, kMeasures>(params, plan, scratch, stream);
    };
    error = params.student.dtype == params.teacher.dtype ? with_element(params.student.dtype, start)
                                                         : start(AnyElement{});
    if (error != cudaSuccess) return error;
  }
  return launch(finish_kernel, alone, stream, params, Scratch{scratch, cluster}, kMeasures);
}

}  // namespace

int64_t dual_kl_scratch(const DualKLParams& params) {
  return params.rows * kMaxCluster * (params.row_results != nullptr ? 3 : 1);
}

int dual_kl(const DualKLParams& params, float* scratch, void* stream) {
  return params.row_results != nullptr ? run<true>(params, scratch, stream)
                                       : run<false>(params, scratch, stream);
}

}  // namespace leaf::cuda
