#pragma once

// A row of both models' logits, as one block of dual_kl's kernel works on it: copies, softmax,
// terms and gradient. The mathematics is at the head of dual_kl.cu.
//
// A held row is shared by the blocks of a cluster: each copies its slice to shared memory, and its
// threads read back what they copied themselves. A streamed row is one block's, which reads it from
// memory twice.

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "leaf/dual_kl.h"
#include "logits.cuh"
#include "softmax.cuh"

namespace leaf::cuda {

constexpr int kHeldThreads = 256;
constexpr int kStreamedThreads = 512;

// What is summed over a row once its softmax is known.
struct Sums {
  float kl = 0.0f;
  float student_entropy = 0.0f;
  float teacher_entropy = 0.0f;
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.kl + b.kl, a.student_entropy + b.student_entropy,
          a.teacher_entropy + b.teacher_entropy};
}

// What a block knows of a row, and blocks exchange.
template <bool kMeasures>
struct Part {
  SoftmaxPart student;
  SoftmaxPart teacher;
};
template <>
struct Part<true> {
  SoftmaxPart student;
  SoftmaxPart teacher;
  Largest student_top;
  Largest teacher_top;
};

// One model's row as a block sees it.
template <class E>
struct Side {
  RowOf<E> row;
  Activation activation;
  char* slots;  // shared memory of this block's groups

  __device__ Side(const Logits& logits, int64_t index, int pad, char* memory)
      : row(logits.data, logits.dtype, index, logits.row_stride, pad),
        activation{logits.scale, logits.softcap},
        slots(memory) {}
};

LEAF_HOST_DEVICE inline int common_vocab(const DualKLParams& params) {
  return static_cast<int>(params.student.vocab < params.teacher.vocab ? params.student.vocab
                                                                      : params.teacher.vocab);
}

// A row pair; kHeld: in shared memory, else streamed.
template <class E, bool kHeld, bool kMeasures>
class Row {
 public:
  static constexpr int kThreads = kHeld ? kHeldThreads : kStreamedThreads;

  __device__ Row(const DualKLParams& params, int64_t index, int64_t held_groups, char* memory)
      : p_(params),
        grouping_{common_vocab(params), row_pad(params.student.data, params.student.dtype, index,
                                                params.student.row_stride)},
        student_(params.student, index, grouping_.pad, memory),
        teacher_(params.teacher, index, grouping_.pad,
                 memory + held_groups * kGroup * size_of(params.student.dtype)),
        grad_(params.grad, params.grad_dtype, index, params.grad_row_stride, grouping_.pad),
        exponent_(kLog2e / params.temperature) {
    const int count = grouping_.count();
    const int share = kHeld ? (count + cluster_size() - 1) / cluster_size() : count;
    begin_ = kHeld ? min(cluster_rank() * share, count) : 0;
    end_ = min(begin_ + share, count);
  }

  __device__ void copy() {
    if (student_.row.aligned && teacher_.row.aligned) {
      copy_whole_groups();
      // The elements of partial groups come one by one, and are waited for.
      copy_if_partial(begin_);
      if (end_ - begin_ > 1) copy_if_partial(end_ - 1);
    } else {
      for (int g = begin_ + thread(); g < end_; g += kThreads) copy_groups(g);
    }
    wait_for_copies();
  }

  // Of the groups of this thread.
  __device__ Part<kMeasures> part() const {
    Part<kMeasures> part;
    for (int g = begin_ + thread(); g < end_; g += kThreads) {
      Group student = read(student_, g);
      Group teacher = read(teacher_, g);
      if constexpr (kMeasures) {
        part.student_top.add(student, grouping_.first(g));
        part.teacher_top.add(teacher, grouping_.first(g));
      }
      activate(student_, g, student);
      activate(teacher_, g, teacher);
      part.student.add(student, exponent_);
      part.teacher.add(teacher, exponent_);
    }
    return part;
  }

  __device__ Part<kMeasures> merged(const Part<kMeasures>& a, const Part<kMeasures>& b) const {
    Part<kMeasures> both;
    both.student = a.student.merged(b.student, exponent_);
    both.teacher = a.teacher.merged(b.teacher, exponent_);
    if constexpr (kMeasures) {
      both.student_top = a.student_top.merged(b.student_top);
      both.teacher_top = a.teacher_top.merged(b.teacher_top);
    }
    return both;
  }

  // Writes the gradient of this thread's groups and sums up their terms. `factor`: of p_s - p_t.
  __device__ Sums terms(const Part<kMeasures>& row, float factor) {
    const Known known{row.student.max,          row.teacher.max,         1.0f / row.student.total,
                      1.0f / row.teacher.total, logf(row.student.total), logf(row.teacher.total)};
    // The same row as grad_ where its dtype is known when this is compiled.
    const bool own_type = !std::is_same_v<E, AnyElement> && p_.grad_dtype == p_.student.dtype;
    const RowOf<E> own(grad_.data, p_.student.dtype, 0, 0, grouping_.pad);
    Sums sums;
    // The same number of rounds in all threads, for the barrier.
    for (int start = begin_; start < end_; start += kThreads) {
      const int g = start + thread();
      const bool mine = g < end_;
      Group student;
      Group teacher;
      if (mine) {
        student = read(student_, g);
        teacher = read(teacher_, g);
      }
      // The gradient may lie, narrower, in the student's memory: what this round overwrites was
      // read in this round or before.
      if (!kHeld) __syncthreads();
      if (!mine) continue;
      activate(student_, g, student);
      activate(teacher_, g, teacher);
      Group difference;
      sums = sums + group_terms(student, teacher, known, difference);
      if (p_.grad == nullptr) continue;
#pragma unroll
      for (float& x : difference.x) x *= factor;
      student_.activation.multiply_slope(student, difference);
      if (own_type) {
        write_group(own, grouping_, g, difference);
      } else {
        write_group(grad_, grouping_, g, difference);
      }
    }
    return sums;
  }

  // What the common vocabulary leaves of the gradient's row is 0.
  __device__ void zero_rest() {
    if (p_.grad == nullptr) return;
    const int size = kHeld ? cluster_size() : 1;
    const int rank = kHeld ? cluster_rank() : 0;
    const int64_t bytes = (p_.student.vocab - grouping_.width) * size_of(p_.grad_dtype);
    zero_bytes(grad_.at(grouping_.width), bytes, rank * blockDim.x + threadIdx.x,
               size * blockDim.x);
  }

 private:
  struct Known {
    float max_s, max_t;
    float inv_s, inv_t;
    float log_s, log_t;
  };

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }

  __device__ void copy_groups(int group) {
    copy_group(student_.row, grouping_, group, slot(student_, group));
    copy_group(teacher_.row, grouping_, group, slot(teacher_, group));
  }

  // Addresses are carried along: computing them anew would take as long as all the rest.
  __device__ void copy_whole_groups() {
    const int bytes_s = student_.row.group_bytes();
    const int bytes_t = teacher_.row.group_bytes();
    int g = begin_ + thread();
    const char* from_s = student_.row.at(grouping_.first(g));
    const char* from_t = teacher_.row.at(grouping_.first(g));
    char* to_s = slot(student_, g);
    char* to_t = slot(teacher_, g);
#pragma unroll 1
    for (; g < end_; g += kThreads) {
      if (grouping_.whole(g)) {
        for (int byte = 0; byte < bytes_s; byte += 16) copy_16_bytes(to_s + byte, from_s + byte);
        for (int byte = 0; byte < bytes_t; byte += 16) copy_16_bytes(to_t + byte, from_t + byte);
      }
      from_s += kThreads * bytes_s;
      from_t += kThreads * bytes_t;
      to_s += kThreads * bytes_s;
      to_t += kThreads * bytes_t;
    }
  }

  // By the thread that reads it back.
  __device__ void copy_if_partial(int group) {
    const bool mine = begin_ < end_ && (group - begin_) % kThreads == thread();
    if (mine && !grouping_.whole(group)) copy_groups(group);
  }

  __device__ char* slot(const Side<E>& side, int group) const {
    return side.slots + (group - begin_) * side.row.group_bytes();
  }

  __device__ __forceinline__ Group read(const Side<E>& side, int group) const {
    if constexpr (kHeld)
      return read_slot(side.row, slot(side, group));
    else
      return read_group(side.row, grouping_, group);
  }

  __device__ __forceinline__ void activate(const Side<E>& side, int group, Group& x) const {
    side.activation.apply(grouping_, group, x);
  }

  __device__ __forceinline__ Sums group_terms(const Group& y_s, const Group& y_t,
                                              const Known& known, Group& difference) const {
    const float inverse = 1.0f / p_.temperature;
    Group kl;
    Group entropy_s;
    Group entropy_t;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float below_s = y_s.x[i] - known.max_s;
      const float below_t = y_t.x[i] - known.max_t;
      const float p_s = exp2_fast(below_s * exponent_) * known.inv_s;
      const float p_t = exp2_fast(below_t * exponent_) * known.inv_t;
      const float log_ratio = fmaf(below_t - below_s, inverse, known.log_s - known.log_t);
      difference.x[i] = difference_and_term(p_s, p_t, log_ratio, &kl.x[i]);
      if constexpr (kMeasures) {
        entropy_s.x[i] = entropy_term(p_s, fmaf(below_s, inverse, -known.log_s));
        entropy_t.x[i] = entropy_term(p_t, fmaf(below_t, inverse, -known.log_t));
      }
    }
    Sums sums;
    sums.kl = sum(kl);
    if constexpr (kMeasures) {
      sums.student_entropy = sum(entropy_s);
      sums.teacher_entropy = sum(entropy_t);
    }
    return sums;
  }

  // p_s - p_t, and p_s - p_t + p_t l in `term`.
  static __device__ __forceinline__ float difference_and_term(float p_s, float p_t, float log_ratio,
                                                              float* term) {
    const float l = p_t == 0.0f ? 1.0f : log_ratio;  // only not NaN, as where both are -inf
    // exp(-l) - 1 + l = l^2 (1/2 - l/6 + l^2/24 - l^3/120 + l^4/720 - l^5/5040 ...), to a relative
    // 8e-7 for |l| < 0.5. The last term is spread over l^3 and l as Chebyshev's T5 does it, with
    // x^5 = (20 x^3 - 5 x) / 16 + T5 / 16 for x = 2 l.
    float series = fmaf(1.0f / 720, l, -1.0f / 120 - 0.3125f / 5040);
    series = fmaf(series, l, 1.0f / 24);
    series = fmaf(series, l, -1.0f / 6 + 0.01953125f / 5040);
    series = fmaf(series, l, 1.0f / 2);
    const float phi = series * l * l;
    const bool near = fabsf(l) < 0.5f;
    const float difference = near ? p_t * (phi - l) : p_s - p_t;
    *term = near ? p_t * phi : fmaf(p_t, l, difference);
    return difference;
  }

  static __device__ __forceinline__ float entropy_term(float p, float log_p) {
    return p != 0.0f ? -p * log_p : 0.0f;  // NaN != 0: it stays
  }

  const DualKLParams& p_;
  Grouping grouping_;
  Side<E> student_;
  Side<E> teacher_;
  RowOf<AnyElement> grad_;
  float exponent_;  // log2(e) / T
  int begin_;       // the groups of this block
  int end_;
};

}  // namespace leaf::cuda
