// loss = T^2 sum_i w_i D(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum and d = sum_v exp((y - m) / T):
//
//     log2 p = (y - m) / T log2(e) - log2 d
//     l      = log p_t - log p_s
//     KL     = sum_v p_s - p_t + p_t l
//     grad   = w T (p_s - p_t) dy_s/dz_s
//
// If l is small, the term of the sum is p_t (exp(-l) - 1 + l), computed by its series to avoid
// cancellation. Errors of log2 d cancel in the sum to first order, except for a factor of p_t,
// which is known and removed. The other divergences are in terms.cuh.
//
// A row of both models is resident in the shared memory of a cluster of thread blocks, a slice in
// each block: a logit is read from memory once. Three passes over shared memory compute maxima,
// then sums of powers, then terms and gradient. The gradient of a divergence other than KL(p_t,
// p_s) is a fourth pass, after an exchange of sums. Warps and blocks merge their parts once, in a
// fixed order: one warp of each block sends its part to all blocks, and one thread sends the
// block's sums to the first block. Logits beyond the shared memory of the largest cluster are
// streaming: they are read from memory twice, or three times.

#include "leaf/dual_kl.h"

#include <algorithm>

#include "block.cuh"
#include "device.cuh"
#include "dual_kl_merge.cuh"
#include "dual_kl_row.cuh"
#include "launch.cuh"
#include "leaf/cuda.h"
#include "logits.cuh"
#include "loss.cuh"

namespace leaf::cuda {
namespace {

constexpr int kPortableCluster = 8;  // the cluster size that every GPU with clusters can run

// Writes the results of a row of weight 0.
template <bool kMeasures>
__device__ __forceinline__ void drop_row(const DualKLParams& params, int64_t index, float* row_kl,
                                         int size, int rank) {
  if (rank == 0 && threadIdx.x == 0) {
    row_kl[index] = 0.0f;
    for (int i = 1; kMeasures && i < 4; ++i) params.row_results[i * params.rows + index] = 0.0f;
  }
  if (params.grad == nullptr) return;
  const int64_t bytes = size_of(params.grad_dtype);
  zero_bytes(static_cast<char*>(params.grad) + index * params.grad_row_stride * bytes,
             params.student.vocab * bytes, rank * blockDim.x + threadIdx.x, size * blockDim.x);
}

// One cluster computes a row. `row_kl` [rows] gets the divergences; `slots` is the number of groups
// of logits that fit into a block's shared memory.
template <class Kind>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    rows_kernel(const DualKLParams params, float* row_kl, const int slots) {
  const int size = cluster_size();
  const int rank = cluster_rank();
  const int64_t index = cluster_index();
  const float weight = params.row_weight[index];
  if (weight == 0.0f) return drop_row<Kind::kMeasures>(params, index, row_kl, size, rank);

  auto& shared = *dynamic_shared<Shared<Kind>>();
  Row<Kind> row(params, index, slots, reinterpret_cast<char*>(&shared + 1));
  row.copy(shared.copies);
  if (size > 1) {
    if (threadIdx.x == 0) {
      expect(shared.parts, size * sizeof(RowPart<Kind::kExact>));
      if (rank == 0) expect(shared.outcomes, size * sizeof(Outcome<Kind::kMeasures>));
      if constexpr (!Kind::kOnePass) {
        if (params.grad != nullptr) expect(shared.mean_arrivals, size * sizeof(Means<double>));
      }
    }
    cluster_announce();
  }
  __syncthreads();
  wait_for_copies(shared.copies);
  const auto part = row.part();
  if (lane_index() == 0) shared.warps[warp_index()] = part;
  if (size > 1) cluster_wait();
  __syncthreads();
  if (warp_index() == 0) merge_parts(shared, row.exponent());
  __syncthreads();

  float factor = weight * params.temperature * params.student.scale;
  if (params.grad_dtype == DType::kFloat16) factor *= *params.grad_scale;
  Sums<float> sums;
  if constexpr (Kind::kOnePass) {
    sums = row.terms(shared.student, shared.teacher, factor);
  } else {
    Means<float> means;
    sums = row.sums(shared.student, shared.teacher, means);
    if (params.grad != nullptr) {
      row.write(shared.student, shared.teacher, mean_of_row(shared, means), factor);
    }
  }
  row.zero_rest();
  const Outcome<Kind::kMeasures> outcome = outcome_of_warp(row, sums);
  if (lane_index() == 0) shared.warp_outcomes[warp_index()] = outcome;
  __syncthreads();
  if (threadIdx.x == 0) finish_row(params, index, row_kl, shared);
}

// The layout of a row on the device.
struct Plan {
  int threads;
  int cluster;
  int slots;  // groups of logits that fit into a block's shared memory
  size_t shared_bytes;
  bool whole;  // all of a row is resident in the slots

  Launch launch(int64_t rows) const { return {rows * cluster, threads, shared_bytes, cluster}; }
};

int attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// Available shared memory, in bytes.
struct Room {
  int64_t of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int64_t of_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
};

// The plan for clusters of `cluster` blocks, `blocks` of which share a multiprocessor.
template <class Kind>
Plan plan_of(const DualKLParams& params, const Room& room, int cluster, int blocks) {
  constexpr int64_t kElements = kGroup<typename Kind::Element>;
  constexpr int64_t kReserved = 1024;  // bytes that the system takes of each block
  const int64_t most = std::min(room.of_block, room.of_multiprocessor / blocks - kReserved);
  const int64_t own = sizeof(Shared<Kind>);
  const int64_t groups = (common_vocab(params) + 2 * (kElements - 1)) / kElements;  // with any pad
  const int64_t wanted = (groups + cluster - 1) / cluster;
  const int64_t slots = std::clamp<int64_t>((most - own) / (2 * 16), 0, wanted);
  const int threads = kRowThreads / blocks / kWarp * kWarp;
  return {threads, cluster, static_cast<int>(slots), static_cast<size_t>(own + 2 * 16 * slots),
          slots == wanted};
}

// Chooses the most blocks on a multiprocessor with which a whole row is resident, then the smallest
// such cluster. If there is none, it chooses the largest cluster, with most of a row resident. A
// gradient that overwrites wider logits must not reach logits that another block will read again.
template <class Kind>
Plan make_plan(const DualKLParams& params, int largest_cluster) {
  const Room room;
  for (int blocks = kMostBlocks; blocks >= kFewestBlocks; --blocks) {
    for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
      const Plan plan = plan_of<Kind>(params, room, cluster, blocks);
      if (plan.whole) return plan;
    }
  }
  using E = typename Kind::Element;
  const Plan plan = plan_of<Kind>(params, room, largest_cluster, kFewestBlocks);
  const bool narrows =
      params.grad != nullptr && size_of(params.grad_dtype) < int64_t{sizeof(typename E::Bits)};
  const int64_t resident = int64_t{kGroup<E>} * plan.slots * largest_cluster;
  const bool safe = !narrows || 2 * resident >= params.student.vocab + 2 * kGroup<E>;
  return safe ? plan : plan_of<Kind>(params, room, 1, kFewestBlocks);
}

// Sets the kernel's attributes for the shared memory and the cluster size of its plan.
template <class Kind>
cudaError_t permit(const Plan& plan) {
  const auto kernel = rows_kernel<Kind>;
  // Equal in all calls, because another thread may launch the kernel between this and our launch.
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && plan.cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return reported(error);
}

template <class Kind>
cudaError_t launch_rows(const DualKLParams& params, const Plan& plan, float* row_kl, void* stream) {
  const cudaError_t error = permit<Kind>(plan);
  if (error != cudaSuccess) return error;
  return launch(rows_kernel<Kind>, plan.launch(params.rows), stream, params, row_kl, plan.slots);
}

template <class Kind>
Plan plan_for(const DualKLParams& params) {
  // Asks the code that runs, because a newer GPU may run code compiled for an older one.
  cudaFuncAttributes compiled{};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, rows_kernel<Kind>);
  const bool clusters = reported(error) == cudaSuccess && compiled.ptxVersion >= 90;
  const Plan plan = make_plan<Kind>(params, clusters ? kMaxCluster : 1);
  if (plan.cluster <= kPortableCluster) return plan;
  const bool runs =
      permit<Kind>(plan) == cudaSuccess && fits(rows_kernel<Kind>, plan.launch(params.rows));
  return runs ? plan : make_plan<Kind>(params, kPortableCluster);
}

template <class Kind>
cudaError_t start_rows(const DualKLParams& params, float* row_kl, void* stream) {
  const Plan plan = plan_for<Kind>(params);
  const cudaError_t error = launch_rows<Kind>(params, plan, row_kl, stream);
  // A partition of a GPU may be too small for any cluster.
  if (error != cudaErrorInvalidClusterSize || plan.cluster == 1) return error;
  return launch_rows<Kind>(params, make_plan<Kind>(params, 1), row_kl, stream);
}

template <class E, bool kMeasures>
cudaError_t start(const DualKLParams& params, float* row_kl, void* stream) {
  if (params.beta == 1.0f) {
    return start_rows<RowKind<E, false, kMeasures, ReverseKL>>(params, row_kl, stream);
  }
  if (params.beta != 0.0f) {
    return start_rows<RowKind<E, false, kMeasures, JensenShannon>>(params, row_kl, stream);
  }
  const auto plain = [](const Logits& z) { return z.scale == 1.0f && z.softcap == 0.0f; };
  return plain(params.student) && plain(params.teacher)
             ? start_rows<RowKind<E, true, kMeasures>>(params, row_kl, stream)
             : start_rows<RowKind<E, false, kMeasures>>(params, row_kl, stream);
}

template <bool kMeasures>
cudaError_t run(const DualKLParams& params, float* row_kl, void* stream) {
  const Launch alone{1, kFinishThreads};
  cudaError_t error = cudaSuccess;
  if (params.grad != nullptr && params.grad_dtype == DType::kFloat16) {
    error = launch(scale_kernel<DualKLParams>, alone, stream, params);
    if (error != cudaSuccess) return error;
  }
  if (params.rows > 0) {
    error = with_element(params.student.dtype, [&](auto element) {
      return start<decltype(element), kMeasures>(params, row_kl, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(finish_kernel<DualKLParams>, alone, stream, params, row_kl);
}

}  // namespace

int64_t dual_kl_scratch(const DualKLParams& params) {
  return params.row_results != nullptr ? 0 : params.rows;
}

int dual_kl(const DualKLParams& params, float* scratch, void* stream) {
  if (params.student.dtype != params.teacher.dtype) return cudaErrorInvalidValue;
  return params.row_results != nullptr ? run<true>(params, params.row_results, stream)
                                       : run<false>(params, scratch, stream);
}

}  // namespace leaf::cuda
