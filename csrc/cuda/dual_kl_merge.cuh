#pragma once

// The exchange between the warps and blocks of dual_kl's kernel: one for the softmax of a row
// before its gradient is written, one for its sums afterwards.

#include <type_traits>

#include "block.cuh"
#include "device.cuh"
#include "dual_kl_row.cuh"
#include "leaf/dual_kl.h"
#include "softmax.cuh"

namespace leaf::cuda {

constexpr int kMaxCluster = 16;  // from compute capability 9.0 on
// Threads on a multiprocessor, which three to six blocks share: one block computes while another
// one waits for memory.
constexpr int kRowThreads = 768;
constexpr int kFewestBlocks = 3;
constexpr int kMostBlocks = 6;
constexpr int kMostThreads = kRowThreads / kFewestBlocks;  // in a block
constexpr int kRowWarps = kMostThreads / kWarp;

// The sums of a warp's, then of a block's, part of a row.
template <bool kMeasures>
struct alignas(16) Outcome {
  double kl;

  __device__ void add(const Outcome& other) { kl += other.kl; }
};
template <>
struct alignas(16) Outcome<true> {
  Sums<double> sums;
  Largest student_top;
  Largest teacher_top;

  __device__ void add(const Outcome& other) {
    sums.kl += other.sums.kl;
    sums.student_power += other.sums.student_power;
    sums.teacher_power += other.sums.teacher_power;
    student_top.add(other.student_top);
    teacher_top.add(other.teacher_top);
  }
};

// A divergence with a second pass for its gradient exchanges this in between.
struct alignas(16) SharedMeans {
  Means<double> warp_means[kRowWarps];
  Means<double> block_means[kMaxCluster];
  Arrivals mean_arrivals;
  float mean;
};
struct NoMeans {};

template <class Kind>
struct alignas(16) Shared : std::conditional_t<Kind::kOnePass, NoMeans, SharedMeans> {
  using Part = RowPart<Kind::kExact>;
  Part warps[kRowWarps];
  Part blocks[kMaxCluster];
  Outcome<Kind::kMeasures> warp_outcomes[kRowWarps];
  Outcome<Kind::kMeasures> block_outcomes[kMaxCluster];
  Normalizer<Kind::kExact> student;
  Normalizer<Kind::kExact> teacher;
  Arrivals copies;
  Arrivals parts;
  Arrivals outcomes;
};

template <class T>
__device__ __forceinline__ void send_all(T* to, const T& value, Arrivals& arrivals, int rank) {
  struct Quads {
    uint4 quad[sizeof(T) / sizeof(uint4)];
  };
  const Quads quads = __builtin_bit_cast(Quads, value);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(uint4)); ++i) {
    send(reinterpret_cast<uint4*>(to) + i, quads.quad[i], arrivals, rank);
  }
}

// Called by one warp: merges the parts of the block's warps, sends the result to all blocks of the
// cluster, and merges the parts of all blocks.
template <class Kind>
__device__ __forceinline__ void merge_parts(Shared<Kind>& shared, float exponent) {
  using Part = RowPart<Kind::kExact>;
  const int lane = lane_index();
  const int size = cluster_size();
  Part part = lane < warp_count() ? shared.warps[lane] : Part{};
  part = part.over_warp(exponent);
  if (size > 1) {
    if (lane < size) send_all(&shared.blocks[cluster_rank()], part, shared.parts, lane);
    wait(shared.parts);
    part = lane < size ? shared.blocks[lane] : Part{};
    part = part.over_warp(exponent);
  }
  if (lane != 0) return;
  shared.student = Normalizer<Kind::kExact>(part.student);
  shared.teacher = Normalizer<Kind::kExact>(part.teacher);
}

__device__ __forceinline__ Means<double> over_warp(const Means<double>& means) {
  const auto add = [](double a, double b) { return a + b; };
  return {warp_all(means.ratio, add), warp_all(means.mass, add)};
}

// Returns sum_v p_s r of the row from the sums of a thread. All threads of the cluster call it; no
// block writes its gradient before all have read their logits.
template <class Kind>
__device__ __forceinline__ float mean_of_row(Shared<Kind>& shared, const Means<float>& means) {
  Means<double> part = over_warp({means.ratio, means.mass});
  if (lane_index() == 0) shared.warp_means[warp_index()] = part;
  __syncthreads();
  if (warp_index() == 0) {
    const int lane = lane_index();
    const int size = cluster_size();
    part = over_warp(lane < warp_count() ? shared.warp_means[lane] : Means<double>{});
    if (size > 1) {
      if (lane < size) {
        send_all(&shared.block_means[cluster_rank()], part, shared.mean_arrivals, lane);
      }
      wait(shared.mean_arrivals);
      part = over_warp(lane < size ? shared.block_means[lane] : Means<double>{});
    }
    if (lane == 0) shared.mean = static_cast<float>(part.ratio / part.mass);
  }
  __syncthreads();
  return shared.mean;
}

template <class Kind>
__device__ __forceinline__ Outcome<Kind::kMeasures> outcome_of_warp(const Row<Kind>& row,
                                                                    const Sums<float>& sums) {
  const auto all = [](double sum) {
    return warp_all(sum, [](double a, double b) { return a + b; });
  };
  if constexpr (Kind::kMeasures) {
    return {{all(sums.kl), all(sums.student_power), all(sums.teacher_power)},
            row.student_top(),
            row.teacher_top()};
  } else {
    return {all(sums.kl)};
  }
}

template <class Kind>
__device__ __forceinline__ void store_row(const DualKLParams& params, int64_t index, float* row_kl,
                                          const Shared<Kind>& shared,
                                          const Outcome<Kind::kMeasures>& outcome) {
  if constexpr (Kind::kMeasures) {
    const auto kl = static_cast<float>(outcome.sums.kl);
    const auto entropy = [](double power, const Normalizer<true>& of) {
      return static_cast<float>((of.shift - power) * kLn2);
    };
    const bool agree = outcome.student_top.place() == outcome.teacher_top.place();
    float* to = params.row_results + index;
    to[0] = kl;
    to[params.rows] = entropy(outcome.sums.student_power * shared.student.inverse, shared.student);
    to[2 * params.rows] = entropy(outcome.sums.teacher_power, shared.teacher);
    to[3 * params.rows] = isnan(kl) ? kl : agree ? 1.0f : 0.0f;
  } else {
    // The errors of both models' rests cancel except for the factor of p_t.
    const double rest = Kind::kExact ? 0.0 : shared.teacher.rest;
    row_kl[index] = static_cast<float>(outcome.kl * (1.0 - kLn2 * rest));
  }
}

// Called by one thread: adds up the sums of the warps and, in the first block, those of the blocks.
template <class Kind>
__device__ __forceinline__ void finish_row(const DualKLParams& params, int64_t index, float* row_kl,
                                           Shared<Kind>& shared) {
  const int size = cluster_size();
  Outcome<Kind::kMeasures> outcome = shared.warp_outcomes[0];
  for (int i = 1; i < warp_count(); ++i) outcome.add(shared.warp_outcomes[i]);
  if (size > 1) {
    send_all(&shared.block_outcomes[cluster_rank()], outcome, shared.outcomes, 0);
    if (cluster_rank() != 0) return;
    wait(shared.outcomes);
    outcome = shared.block_outcomes[0];
    for (int i = 1; i < size; ++i) outcome.add(shared.block_outcomes[i]);
  }
  store_row(params, index, row_kl, shared, outcome);
}

}  // namespace leaf::cuda
