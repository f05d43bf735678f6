#pragma once

// The part of a row of both models' logits that one block of dual_kl's kernel computes: softmax,
// terms and gradient. The mathematics is at the head of dual_kl.cu.
//
// The first groups of a row are resident in the shared memory of the cluster's blocks, a slice in
// each. The remaining ones, the overflow, are streaming: the blocks share them as well and read
// them from memory twice, the second time mostly from the L2 cache.

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "leaf/dual_kl.h"
#include "logits.cuh"
#include "softmax.cuh"
#include "terms.cuh"

namespace leaf::cuda {

LEAF_HOST_DEVICE inline int common_vocab(const DualKLParams& params) {
  return static_cast<int>(params.student.vocab < params.teacher.vocab ? params.student.vocab
                                                                      : params.teacher.vocab);
}

// kPlain: y is the logit itself. kMeasures: entropies and the positions of the largest logits too.
template <class E, bool kIsPlain, bool kHasMeasures, class Of = ForwardKL>
struct RowKind {
  using Element = E;
  using Divergence = Of;
  static constexpr bool kPlain = kIsPlain;
  static constexpr bool kMeasures = kHasMeasures;
  static constexpr bool kOnePass = std::is_same_v<Divergence, ForwardKL>;
  static constexpr bool kExact = kMeasures || !kOnePass || std::is_same_v<E, Float32>;
};

template <class Kind>
class Row {
 public:
  using E = typename Kind::Element;
  using SoftmaxPart = cuda::SoftmaxPart<Kind::kExact>;
  using RowPart = cuda::RowPart<Kind::kExact>;
  using Normalizer = cuda::Normalizer<Kind::kExact>;
  static constexpr int N = kGroup<E>;

  // `memory` has room for `slots` groups of each model.
  __device__ Row(const DualKLParams& params, int64_t index, int slots, char* memory)
      : p_(params),
        grouping_{common_vocab(params),
                  row_pad<E>(params.student.data, index, params.student.row_stride)},
        student_(params.student.data, index, params.student.row_stride, grouping_.pad),
        teacher_(params.teacher.data, index, params.teacher.row_stride, grouping_.pad),
        student_slots_(memory),
        teacher_slots_(memory + slots * 16),
        exponent_(kLog2e / params.temperature) {
    const int count = grouping_.count();
    const int resident = cluster_size() * slots;
    begin_ = min(cluster_rank() * slots, count);
    end_ = min(begin_ + slots, count);
    if (resident < count) {
      const int share = (count - resident + cluster_size() - 1) / cluster_size();
      overflow_begin_ = min(resident + cluster_rank() * share, count);
      overflow_end_ = min(overflow_begin_ + share, count);
    }
    const auto bytes = static_cast<unsigned>(size_of(params.grad_dtype));
    grad_ = static_cast<char*>(params.grad) + index * params.grad_row_stride * bytes;
    whole_begin_ =
        is_aligned(grad_, grouping_.pad * bytes, N * bytes) ? grouping_.whole_begin() : count;
    whole_end_ = grouping_.whole_end();
  }

  // Starts to copy this block's slice. All threads see it after wait_for_copies and a barrier.
  __device__ void copy(Arrivals& arrivals) {
    const int first = max(begin_, grouping_.whole_begin());
    const int last = min(end_, grouping_.whole_end());
    const bool bulk = student_.aligned && teacher_.aligned && first < last;
    const unsigned bytes = bulk ? 16u * static_cast<unsigned>(last - first) : 0u;
    if (thread() == 0) expect(arrivals, 2 * bytes);
    if (!bulk) {
      for (int g = begin_ + thread(); g < end_; g += threads()) copy_group(g);
      return;
    }
    copy_to_shared(slot(student_slots_, first), at(student_, first), bytes, arrivals);
    copy_to_shared(slot(teacher_slots_, first), at(teacher_, first), bytes, arrivals);
    // Only the first and the last group of a row may be partial.
    if (thread() == 0 && begin_ < first) copy_group(begin_);
    if (thread() == kWarp && last < end_) copy_group(last);
    if (thread() == 0 && overflow_begin_ < overflow_end_) {
      const auto more = static_cast<unsigned>(
          max(0, min(overflow_end_, grouping_.whole_end()) - overflow_begin_));
      prefetch(at(student_, overflow_begin_), 16 * more);
      prefetch(at(teacher_, overflow_begin_), 16 * more);
    }
  }

  // Returns the part of the warp's groups; equal in all of its lanes.
  __device__ RowPart part() {
    RowPart part;
    Top student_top;
    Top teacher_top;
    find_maxima(part, student_top, teacher_top);
    part.student.max = warp_all(part.student.max, larger_of);
    part.teacher.max = warp_all(part.teacher.max, larger_of);
#pragma unroll 2
    for (int g = begin_ + thread(); g < end_; g += threads()) {
      part.student.add(activated(student_activation(), g, resident_student(g)), exponent_);
      part.teacher.add(activated(teacher_activation(), g, resident_teacher(g)), exponent_);
    }
    if (overflow_begin_ < overflow_end_) {
#pragma unroll 1
      for (int g = overflow_begin_ + thread(); g < overflow_end_; g += threads()) {
        add_at_once(part.student, student_top, student_activation(), g,
                    student_.read(grouping_, g));
        add_at_once(part.teacher, teacher_top, teacher_activation(), g,
                    teacher_.read(grouping_, g));
      }
      part.raise_to_warp(exponent_);
    }
    part.student.total = warp_all(part.student.total, sum_of);
    part.teacher.total = warp_all(part.teacher.total, sum_of);
    if constexpr (Kind::kMeasures) {
      student_top_ = over_warp(student_top, student_, student_slots_);
      teacher_top_ = over_warp(teacher_top, teacher_, teacher_slots_);
    }
    return part;
  }

  // Writes the gradient of this thread's groups, factor * (p_s - p_t), and sums up their terms.
  __device__ Sums<float> terms(const Normalizer student, const Normalizer teacher, float factor) {
    Sums<float> sums;
    float excess = 0.0f;
    // The probabilities are 2^rest times too large: p_s - p_t is (e_s - even e_t) 2^-rest.
    const float even = Kind::kExact ? 1.0f : fmaf(kLn2, student.rest - teacher.rest, 1.0f);
    if constexpr (!Kind::kExact) factor *= fmaf(-kLn2, student.rest, 1.0f);
    for_groups([&](int g, const Group<N>& y_s, const Group<N>& y_t) {
      Group<N> difference;
      add_terms(y_s, y_t, student, teacher, even, difference, sums, excess);
      if (p_.grad != nullptr) write_gradient(g, y_s, factor, difference);
    });
    sums.kl = fmaf(sums.kl, kLn2, excess);
    return sums;
  }

  // For divergences other than KL(p_t, p_s): returns the sums of this thread's groups.
  __device__ Sums<float> sums(const Normalizer student, const Normalizer teacher,
                              Means<float>& means) const {
    const typename Kind::Divergence divergence(p_);
    Sums<float> sums;
    float excess = 0.0f;
    for_groups([&](int, const Group<N>& y_s, const Group<N>& y_t) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Token<Normalizer> x(y_s.x[i], y_t.x[i], student, teacher, exponent_);
        const float r = divergence.add(x.p_s, x.p_t, x.ratio, sums.kl, excess);
        if (x.p_s != 0.0f) means.ratio = fmaf(x.p_s, r, means.ratio);  // else r may be NaN
        means.mass += x.p_s;
        if constexpr (Kind::kMeasures) sums.add_measures(x.e_s, x.power_s, x.p_t, x.power_t);
      }
    });
    sums.kl = fmaf(sums.kl, kLn2, excess);
    return sums;
  }

  // Writes their gradient, factor * p_s (r - mean), of this thread's groups.
  __device__ void write(const Normalizer student, const Normalizer teacher, float mean,
                        float factor) const {
    const typename Kind::Divergence divergence(p_);
    for_groups([&](int g, const Group<N>& y_s, const Group<N>& y_t) {
      Group<N> slope;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Token<Normalizer> x(y_s.x[i], y_t.x[i], student, teacher, exponent_);
        float unused[2] = {};
        const float r = divergence.add(x.p_s, x.p_t, x.ratio, unused[0], unused[1]);
        slope.x[i] = x.p_s * ((x.p_s == 0.0f ? 0.0f : r) - mean);
      }
      write_gradient(g, y_s, factor, slope);
    });
  }

  // Returns the first of the largest logits of this warp's groups.
  __device__ const Largest& student_top() const { return student_top_; }
  __device__ const Largest& teacher_top() const { return teacher_top_; }

  // Zeroes the gradient beyond the common vocabulary.
  __device__ void zero_rest() {
    const int width = grouping_.width;
    if (p_.grad == nullptr || p_.student.vocab == width) return;
    const int64_t bytes = size_of(p_.grad_dtype);
    zero_bytes(grad_ + width * bytes, (p_.student.vocab - width) * bytes,
               cluster_rank() * threads() + thread(), cluster_size() * threads());
  }

  __device__ float exponent() const { return exponent_; }

 private:
  // Calls visit(g, y_s, y_t) for this thread's groups, of which `visit` may write the gradient.
  template <class Visit>
  __device__ __forceinline__ void for_groups(const Visit& visit) const {
#pragma unroll(N == 4 ? 2 : 1)
    for (int g = begin_ + thread(); g < end_; g += threads()) {
      visit(g, activated(student_activation(), g, resident_student(g)),
            activated(teacher_activation(), g, resident_teacher(g)));
    }
    // All threads make the same number of rounds, because each has a barrier.
#pragma unroll 1
    for (int start = overflow_begin_; start < overflow_end_; start += threads()) {
      const int g = start + thread();
      const bool mine = g < overflow_end_;
      Words<E, N> z_s;
      Words<E, N> z_t;
      if (mine) {
        z_s = student_.read(grouping_, g);
        z_t = teacher_.read(grouping_, g);
      }
      // A narrower gradient may overwrite the student's logits. The logits that this round
      // overwrites were read in this round or before; with several blocks they are resident.
      __syncthreads();
      if (!mine) continue;
      visit(g, activated(student_activation(), g, z_s), activated(teacher_activation(), g, z_t));
    }
  }

  // The largest logit of a thread, and the first group that contains it.
  struct Top {
    float value = -INFINITY;
    int group = -1;

    __device__ __forceinline__ void add(const Words<E, N>& words, int index) {
      Maximum<E> maximum;
      maximum.add(words);
      const float top = maximum.value();
      group = top > value ? index : group;
      value = fmaxf(value, top);
    }
  };

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ int threads() { return static_cast<int>(blockDim.x); }
  __device__ Activation student_activation() const {
    return {p_.student.scale, p_.student.softcap};
  }
  __device__ Activation teacher_activation() const {
    return {p_.teacher.scale, p_.teacher.softcap};
  }

  __device__ char* slot(char* slots, int group) const { return slots + 16 * (group - begin_); }
  __device__ const char* at(const RowOf<E, N>& row, int group) const {
    return reinterpret_cast<const char*>(row.data + grouping_.first(group));
  }
  __device__ void copy_group(int g) {
    *reinterpret_cast<Words<E, N>*>(slot(student_slots_, g)) = student_.read(grouping_, g);
    *reinterpret_cast<Words<E, N>*>(slot(teacher_slots_, g)) = teacher_.read(grouping_, g);
  }
  __device__ __forceinline__ Words<E, N> resident_student(int g) const {
    return load_words<E, N>(slot(student_slots_, g));
  }
  __device__ __forceinline__ Words<E, N> resident_teacher(int g) const {
    return load_words<E, N>(slot(teacher_slots_, g));
  }

  __device__ __forceinline__ Group<N> activated(const Activation& activation, int g,
                                                const Words<E, N>& words) const {
    Group<N> y = words.unpacked();
    if constexpr (!Kind::kPlain) activation.apply(grouping_, g, y);
    return y;
  }

  __device__ __forceinline__ void find_maxima(RowPart& part, Top& student_top, Top& teacher_top) {
    if constexpr (Kind::kPlain && !Kind::kMeasures) {
      Maximum<E> student;
      Maximum<E> teacher;
#pragma unroll 2
      for (int g = begin_ + thread(); g < end_; g += threads()) {
        student.add(resident_student(g));
        teacher.add(resident_teacher(g));
      }
      part.student.max = SoftmaxPart::unit(student.value(), exponent_);
      part.teacher.max = SoftmaxPart::unit(teacher.value(), exponent_);
    } else {
#pragma unroll 2
      for (int g = begin_ + thread(); g < end_; g += threads()) {
        add_maxima(part.student, student_top, student_activation(), g, resident_student(g));
        add_maxima(part.teacher, teacher_top, teacher_activation(), g, resident_teacher(g));
      }
      if constexpr (Kind::kPlain) {
        part.student.max = SoftmaxPart::unit(student_top.value, exponent_);
        part.teacher.max = SoftmaxPart::unit(teacher_top.value, exponent_);
      }
    }
  }

  __device__ __forceinline__ void add_maxima(SoftmaxPart& part, Top& top,
                                             const Activation& activation, int g,
                                             const Words<E, N>& words) const {
    if constexpr (Kind::kMeasures) top.add(words, g);
    if constexpr (!Kind::kPlain) {
      const float top = largest(activated(activation, g, words));
      part.max = fmaxf(part.max, SoftmaxPart::unit(top, exponent_));
    }
  }

  __device__ __forceinline__ void add_at_once(SoftmaxPart& part, Top& top,
                                              const Activation& activation, int g,
                                              const Words<E, N>& words) const {
    if constexpr (Kind::kMeasures) top.add(words, g);
    const Group<N> y = activated(activation, g, words);
    part.raise(fmaxf(part.max, SoftmaxPart::unit(largest(y), exponent_)), exponent_);
    part.add(y, exponent_);
  }

  // Returns the first of the largest logits of all lanes.
  __device__ __forceinline__ Largest over_warp(const Top& top, const RowOf<E, N>& row,
                                               char* slots) const {
    Largest all;
    all.value = warp_all(top.value, larger_of);
    int index = INT32_MAX;
    if (top.group >= 0 && top.value == all.value) {
      const Words<E, N> words = top.group < end_ ? load_words<E, N>(slot(slots, top.group))
                                                 : row.read(grouping_, top.group);
      const Group<N> z = words.unpacked();
#pragma unroll
      for (int i = N - 1; i >= 0; --i) {
        if (z.x[i] == top.value) index = grouping_.first(top.group) + i;
      }
    }
    all.index = __reduce_min_sync(kFullMask, index);
    return all;
  }

  __device__ __forceinline__ void add_terms(const Group<N>& y_s, const Group<N>& y_t,
                                            const Normalizer& student, const Normalizer& teacher,
                                            float even, Group<N>& difference, Sums<float>& sums,
                                            float& excess) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float power_s = student.power(y_s.x[i], exponent_);
      const float power_t = teacher.power(y_t.x[i], exponent_);
      const float e_s = exp2_fast(power_s);
      const float p_t = teacher.probability(exp2_fast(power_t));
      float ratio = power_t - power_s;
      if constexpr (Kind::kExact) ratio += student.shift - teacher.shift;
      difference.x[i] = Kind::kExact ? fmaf(e_s, student.inverse, -p_t) : fmaf(-even, p_t, e_s);
      // The terms need the same error in p and in its logarithm.
      add_term(p_t, ratio, Kind::kExact ? difference.x[i] : e_s - p_t, sums.kl, excess);
      if constexpr (Kind::kMeasures) sums.add_measures(e_s, power_s, p_t, power_t);
    }
  }

  // Writes a group of the gradient, factor * slope, with the derivative of the softcap.
  __device__ __forceinline__ void write_gradient(int g, const Group<N>& y_s, float factor,
                                                 Group<N>& slope) const {
#pragma unroll
    for (float& x : slope.x) x *= factor;
    if constexpr (!Kind::kPlain) student_activation().multiply_slope(y_s, slope);
    write_gradient(g, slope);
  }

  __device__ __forceinline__ void write_gradient(int g, const Group<N>& x) const {
    if constexpr (!std::is_same_v<E, Float32>) {
      write_gradient_as<E>(g, x);
    } else if (p_.grad_dtype == DType::kBFloat16) {
      write_gradient_as<BFloat16>(g, x);
    } else if (p_.grad_dtype == DType::kFloat16) {
      write_gradient_as<Float16>(g, x);
    } else {
      write_gradient_as<Float32>(g, x);
    }
  }

  template <class G>
  __device__ __forceinline__ void write_gradient_as(int g, const Group<N>& x) const {
    const int first = grouping_.first(g);
    auto* to = reinterpret_cast<typename G::Bits*>(grad_) + first;
    if (g >= whole_begin_ && g < whole_end_) {
      store_words<G, N>(to, packed<G, N>(x));
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (grouping_.has(first + i)) to[i] = G::store(x.x[i]);
    }
  }

  const DualKLParams& p_;
  Grouping<N> grouping_;
  RowOf<E, N> student_;
  RowOf<E, N> teacher_;
  char* student_slots_;  // shared memory of this block's resident groups
  char* teacher_slots_;
  char* grad_;
  float exponent_;  // log2(e) / T
  int begin_;       // the resident groups of this block: [begin_, end_)
  int end_;
  int overflow_begin_ = 0;
  int overflow_end_ = 0;
  int whole_begin_;  // the groups whose gradient is one store: [whole_begin_, whole_end_)
  int whole_end_;
  Largest student_top_;
  Largest teacher_top_;
};

}  // namespace leaf::cuda
