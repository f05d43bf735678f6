// loss = T^2 sum_i w_i KL(p_t, p_s) over k + 1 outcomes, the k ids of a row and all others
// together, and its gradient. With y the scaled, capped logit, m and d the maximum and the sum of
// powers exp((y - m) / T) of the logits that are at no id, and u their probability:
//
//     KL   = sum_j q_j - p_j + p_j log(p_j / q_j)  +  u - t + t log(t / u)
//     grad = w T (q_j - p_j) dy/dz on the ids, w T (u - t) exp((y - m) / T) / d dy/dz on the others
//
// u is a sum of the others' own powers, never a difference to 1. A bitmap in shared memory tells
// which logits are at an id.
//
// A block computes a row, which it reads from memory twice, the second time mostly from the L2
// cache. In the second pass it writes values without a meaning at the ids, which it overwrites at
// the end.

#include "leaf/topk_kl.h"

#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "leaf/cuda.h"
#include "logits.cuh"
#include "loss.cuh"
#include "softmax.cuh"
#include "terms.cuh"

namespace leaf::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kIds = kMostTopk / kThreads;  // of a thread
constexpr int kBitmapWords = 1 << 13;       // for 2^18 logits; a longer row has several

// The parts that threads exchange; shared memory takes no type with a constructor.
struct Part {
  float max;
  float total;
};
struct Place {
  float value;
  int index;
};

struct Shared {
  uint32_t bitmap[kBitmapWords];
  Part parts[kMaxWarps];
  Place places[kMaxWarps];
  double sums[kMaxWarps];
};

// The ids of a thread; an unused one has a probability of 0 for both models.
struct Listed {
  int id[kIds];  // -1 if unused
  float z[kIds];
  float y[kIds];
  float slope[kIds];
  float log2_t[kIds];
};

template <class E>
class Row {
 public:
  static constexpr int N = kGroup<E>;

  __device__ Row(const TopkKLParams& params, Shared& shared)
      : p_(params),
        shared_(shared),
        index_(blockIdx.x),
        grouping_{static_cast<int>(params.student.vocab),
                  row_pad<E>(params.student.data, index_, params.student.row_stride)},
        student_(params.student.data, index_, params.student.row_stride, grouping_.pad),
        activation_{params.student.scale, params.student.softcap},
        exponent_(kLog2e / params.temperature) {}

  // Loads the ids and the logits at them, before any is overwritten.
  __device__ void list_ids() {
    const int64_t begin = index_ * p_.k;
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      const int64_t j = threadIdx.x + int64_t{i} * kThreads;
      const int64_t id = j < p_.k ? p_.ids[begin + j] : -1;
      const bool used = id >= 0 && id < p_.student.vocab;
      listed_.id[i] = used ? static_cast<int>(id) : -1;
      listed_.z[i] = used ? E::load(student_.data[id]) : -INFINITY;
      listed_.log2_t[i] = used ? p_.logprobs[begin + j] * kLog2e : -INFINITY;
      listed_.slope[i] = 1.0f;
      listed_.y[i] = listed_.z[i] * activation_.scale;
      if (activation_.softcap != 0.0f && used) {
        const float tanh = tanhf(listed_.z[i] * (activation_.scale / activation_.softcap));
        listed_.y[i] = activation_.softcap * tanh;
        listed_.slope[i] = (1.0f - tanh) * (1.0f + tanh);
      }
    }
  }

  // Returns the softmax over the ids; equal in all threads.
  __device__ Part part_of_ids() {
    SoftmaxPart<true> part;
#pragma unroll
    for (int i = 0; i < kIds; ++i) part.max = fmaxf(part.max, listed_.y[i]);
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      part.total += exp2_fast((listed_.y[i] - part.max) * exponent_);
    }
    return over_block({part.max, part.total});
  }

  // Returns the softmax over all other logits; equal in all threads. Finds the first of the largest
  // logits of the whole row, if `place` is given.
  __device__ Part part_of_others(Place* place) {
    constexpr int kGroups = kBitmapWords * 32 / N;
    SoftmaxPart<true> part;
    for (int begin = 0; begin < grouping_.count(); begin += kGroups) {
      const int end = min(begin + kGroups, grouping_.count());
      mark_ids(begin, end);
      for (int g = begin + static_cast<int>(threadIdx.x); g < end; g += kThreads) {
        Group<N> y = student_.read(grouping_, g).unpacked();
        if (place != nullptr) find_largest(g, y, *place);
        activation_.apply(grouping_, g, y);
        const int bit = (g - begin) * N;
        const uint32_t at_ids = shared_.bitmap[bit / 32] >> (bit % 32);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if ((at_ids >> i & 1u) != 0) y.x[i] = -INFINITY;
        }
        part.raise(fmaxf(part.max, largest(y)), exponent_);
        part.add(y, exponent_);
      }
    }
    return over_block({part.max, part.total});
  }

  __device__ Part combined(const Part& a, const Part& b) const {
    const float max = fmaxf(a.max, b.max);
    return {max, a.total * exp2_fast((a.max - max) * exponent_) +
                     b.total * exp2_fast((b.max - max) * exponent_)};
  }

  // Writes the gradient of all logits that are at no id, `factor` times their share of u, and
  // returns this thread's part of the sum of 2^power * power over the whole row.
  template <class G>
  __device__ float second_pass(const Part& others, float max, float factor, bool measures) {
    const RowOf<G, N> grad(p_.grad, index_, p_.grad_row_stride, grouping_.pad);
    constexpr bool kNarrower = sizeof(typename G::Bits) < sizeof(typename E::Bits);
    float power_sum = 0.0f;
    // All threads make the same number of rounds, because each may have a barrier.
#pragma unroll 1
    for (int start = 0; start < grouping_.count(); start += kThreads) {
      const int g = start + static_cast<int>(threadIdx.x);
      const bool mine = g < grouping_.count();
      Group<N> y;
      if (mine) y = student_.read(grouping_, g).unpacked();
      // A narrower gradient may overwrite logits of other threads: those that this round overwrites
      // were read in this round or before.
      if constexpr (kNarrower) __syncthreads();
      if (!mine) continue;
      activation_.apply(grouping_, g, y);
      if (measures) {
#pragma unroll
        for (const float x : y.x) {
          const float power = (x - max) * exponent_;
          power_sum = fmaf(exp2_fast(power), fmaxf(power, -1000.0f), power_sum);
        }
      }
      if (p_.grad == nullptr) continue;
      Group<N> value;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value.x[i] = factor * exp2_fast((y.x[i] - others.max) * exponent_);
      }
      activation_.multiply_slope(y, value);
      grad.write(grouping_, g, value);
    }
    return power_sum;
  }

  template <class G>
  __device__ void write_id(int i, float value) const {
    auto* grad = static_cast<typename G::Bits*>(p_.grad) + index_ * p_.grad_row_stride;
    grad[listed_.id[i]] = G::store(value);
  }

  __device__ double sum_over_block(double value) {
    return block_reduce(value, [](double a, double b) { return a + b; }, shared_.sums);
  }
  __device__ Place largest_over_block(const Place& place) {
    return block_reduce(
        place,
        [](const Place& a, const Place& b) {
          const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
          return second ? b : a;
        },
        shared_.places);
  }

  __device__ const Listed& listed() const { return listed_; }
  __device__ float exponent() const { return exponent_; }

 private:
  __device__ Part over_block(const Part& part) {
    return block_reduce(
        part, [&](const Part& a, const Part& b) { return combined(a, b); }, shared_.parts);
  }

  // Sets the bits of the ids in the groups [begin, end).
  __device__ void mark_ids(int begin, int end) {
    const int bits = (end - begin) * N;
    __syncthreads();  // the bitmap may still be read
    for (int i = static_cast<int>(threadIdx.x); i < (bits + 31) / 32; i += kThreads) {
      shared_.bitmap[i] = 0;
    }
    __syncthreads();
#pragma unroll
    for (const int id : listed_.id) {
      const int bit = id + grouping_.pad - begin * N;
      if (id >= 0 && bit >= 0 && bit < bits) atomicOr(&shared_.bitmap[bit / 32], 1u << (bit % 32));
    }
    __syncthreads();
  }

  __device__ void find_largest(int g, const Group<N>& z, Place& place) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (z.x[i] > place.value) place = {z.x[i], grouping_.first(g) + i};
    }
  }

  const TopkKLParams& p_;
  Shared& shared_;
  int64_t index_;
  Grouping<N> grouping_;
  RowOf<E, N> student_;
  Activation activation_;
  float exponent_;  // log2(e) / T
  Listed listed_;
};

// The sums over the ids of a thread, in float32.
struct IdSums {
  float kl = 0.0f;  // in bits, without the excess
  float excess = 0.0f;
  float mass = 0.0f;  // of the teacher
  float power = 0.0f;

  // Adds an outcome and returns p_s - p_t.
  __device__ float add(float p_s, float log2_s, float log2_t) {
    const float p_t = exp2_fast(log2_t);
    add_term(p_t, log2_t - log2_s, p_s - p_t, kl, excess);
    mass += p_t;
    if (p_t != 0.0f) power = fmaf(p_t, log2_t, power);
    return p_s - p_t;
  }
};

__device__ SoftmaxPart<true> softmax_part(const Part& part) {
  SoftmaxPart<true> result;
  result.max = part.max;
  result.total = part.total;
  return result;
}

// Writes the results of a row of weight 0.
__device__ void drop_row(const TopkKLParams& params, float* row_kl) {
  const int64_t index = blockIdx.x;
  if (threadIdx.x == 0) {
    row_kl[index] = 0.0f;
    for (int i = 1; params.row_results != nullptr && i < 4; ++i) {
      params.row_results[i * params.rows + index] = 0.0f;
    }
  }
  if (params.grad == nullptr) return;
  const int64_t bytes = size_of(params.grad_dtype);
  zero_bytes(static_cast<char*>(params.grad) + index * params.grad_row_stride * bytes,
             params.student.vocab * bytes, threadIdx.x, blockDim.x);
}

// E: the logits, G: the gradient. One block computes a row; `row_kl` [rows] gets the divergences.
template <class E, class G>
__global__ void __launch_bounds__(kThreads) rows_kernel(const TopkKLParams params, float* row_kl) {
  __shared__ Shared shared;
  const int64_t index = blockIdx.x;
  const float weight = params.row_weight[index];
  if (weight == 0.0f) return drop_row(params, row_kl);
  const bool measures = params.row_results != nullptr;
  const bool first = threadIdx.x == 0;

  Row<E> row(params, shared);
  row.list_ids();
  Place student_place{-INFINITY, INT32_MAX};
  const Part of_ids = row.part_of_ids();
  const Part others = row.part_of_others(measures ? &student_place : nullptr);
  const Part all = row.combined(of_ids, others);
  const Normalizer<true> whole(softmax_part(all));
  const Normalizer<true> rest(softmax_part(others));
  const float log2_u = (others.max - all.max) * row.exponent() + rest.shift - whole.shift;

  IdSums sums;
  float difference[kIds];
  const Listed& listed = row.listed();
#pragma unroll
  for (int i = 0; i < kIds; ++i) {
    const float power = whole.power(listed.y[i], row.exponent());
    difference[i] = 0.0f;
    if (listed.id[i] < 0) continue;
    difference[i] =
        sums.add(exp2_fast(power) * whole.inverse, power - whole.shift, listed.log2_t[i]);
  }
  IdSums tail;  // in all threads
  const float of_tail = tail.add(exp2_fast(log2_u), log2_u, params.tail[index] * kLog2e);
  if (first) {
    sums.kl += tail.kl;
    sums.excess += tail.excess;
    sums.mass += tail.mass;
    sums.power += tail.power;
  }

  float factor = weight * params.temperature * params.student.scale;
  if (params.grad_dtype == DType::kFloat16) factor *= *params.grad_scale;
  double power_sum = 0.0;
  if (measures || params.grad != nullptr) {
    // Without others there is nothing to divide by.
    const float share = others.total == 0.0f ? 0.0f : factor * of_tail * rest.inverse;
    power_sum = row.template second_pass<G>(others, all.max, share, measures);
  }
  if (params.grad != nullptr) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      if (listed.id[i] < 0) continue;
      row.template write_id<G>(i, factor * difference[i] * listed.slope[i]);
    }
  }

  const auto kl =
      static_cast<float>(row.sum_over_block(static_cast<double>(sums.kl) * kLn2 + sums.excess));
  if (first) row_kl[index] = kl;
  if (!measures) return;
  power_sum = row.sum_over_block(power_sum);
  const double mass = row.sum_over_block(sums.mass);
  const double teacher_power = row.sum_over_block(sums.power);
  Place teacher_place{-INFINITY, INT32_MAX};
#pragma unroll
  for (int i = 0; i < kIds; ++i) {
    const float value = listed.log2_t[i];
    const bool lower = value == teacher_place.value && listed.id[i] < teacher_place.index;
    if (listed.id[i] >= 0 && (value > teacher_place.value || lower)) {
      teacher_place = {value, listed.id[i]};
    }
  }
  student_place = row.largest_over_block(student_place);
  teacher_place = row.largest_over_block(teacher_place);
  if (!first) return;
  float* to = params.row_results + index;
  const int student_index = student_place.value == -INFINITY ? 0 : student_place.index;
  to[params.rows] = static_cast<float>((whole.shift - power_sum * whole.inverse) * kLn2);
  // The products with log2(e) were rounded, and all probabilities are off by much the same factor.
  to[2 * params.rows] = static_cast<float>(-teacher_power / mass * kLn2);
  to[3 * params.rows] = isnan(kl) ? kl : student_index == teacher_place.index ? 1.0f : 0.0f;
}

template <class E, class G>
cudaError_t launch_rows(const TopkKLParams& params, float* row_kl, void* stream) {
  return launch(rows_kernel<E, G>, {params.rows, kThreads}, stream, params, row_kl);
}

template <class E>
cudaError_t run_rows(const TopkKLParams& params, float* row_kl, void* stream) {
  if constexpr (sizeof(typename E::Bits) == 4) {
    if (params.grad != nullptr && params.grad_dtype == DType::kFloat16) {
      return launch_rows<E, Float16>(params, row_kl, stream);
    }
    if (params.grad != nullptr && params.grad_dtype == DType::kBFloat16) {
      return launch_rows<E, BFloat16>(params, row_kl, stream);
    }
  }
  return launch_rows<E, E>(params, row_kl, stream);
}

}  // namespace

int64_t topk_kl_scratch(const TopkKLParams& params) {
  return params.row_results != nullptr ? 0 : params.rows;
}

int topk_kl(const TopkKLParams& params, float* scratch, void* stream) {
  float* row_kl = params.row_results != nullptr ? params.row_results : scratch;
  const Launch alone{1, kFinishThreads};
  cudaError_t error = cudaSuccess;
  if (params.grad != nullptr && params.grad_dtype == DType::kFloat16) {
    error = launch(scale_kernel<TopkKLParams>, alone, stream, params);
    if (error != cudaSuccess) return error;
  }
  if (params.rows > 0) {
    error = with_element(params.student.dtype, [&](auto element) {
      return run_rows<decltype(element)>(params, row_kl, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(finish_kernel<TopkKLParams>, alone, stream, params, row_kl);
}

}  // namespace leaf::cuda
