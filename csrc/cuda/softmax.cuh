#pragma once

// The softmax of a row whose parts are computed by many threads.
//
// y is the scaled, capped logit. A part is its maximum m and its sum d = sum exp((y - m) / T). For
// resident logits the threads of a warp agree on a maximum before they add up powers. Warps and
// blocks merge their parts once.

#include "block.cuh"
#include "logits.cuh"

namespace leaf::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Computes y of a logit z: softcap * tanh(scale * z / softcap), or scale * z if softcap is 0.
struct Activation {
  float scale;
  float softcap;

  // Elements beyond the row stay -inf.
  template <int N>
  __device__ __forceinline__ void apply(const Grouping<N>& grouping, int index,
                                        Group<N>& group) const {
    if (softcap != 0.0f) {
      const float inner = scale / softcap;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float y = softcap * tanhf(group.x[i] * inner);
        group.x[i] = grouping.has(grouping.first(index) + i) ? y : -INFINITY;
      }
    } else if (scale != 1.0f) {
#pragma unroll
      for (float& x : group.x) x *= scale;
    }
  }

  // Multiplies `value` by dy/d(scale z) of a group.
  template <int N>
  __device__ __forceinline__ void multiply_slope(const Group<N>& y, Group<N>& value) const {
    if (softcap == 0.0f) return;
    const float inverse = 1.0f / softcap;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float tanh = y.x[i] * inverse;
      value.x[i] *= (1.0f - tanh) * (1.0f + tanh);
    }
  }
};

// Reduces the elements of a group, in pairs.
template <int N, class Combine>
__device__ __forceinline__ float folded(const Group<N>& group, const Combine& combine) {
  if constexpr (N == 8) {
    const float (&x)[8] = group.x;
    return combine(combine(combine(x[0], x[1]), combine(x[2], x[3])),
                   combine(combine(x[4], x[5]), combine(x[6], x[7])));
  } else {
    const float (&x)[4] = group.x;
    return combine(combine(x[0], x[1]), combine(x[2], x[3]));
  }
}

__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float sum_of(float a, float b) { return a + b; }

template <int N>
__device__ __forceinline__ float largest(const Group<N>& group) {
  return folded(group, larger_of);
}
template <int N>
__device__ __forceinline__ float sum(const Group<N>& group) {
  return folded(group, sum_of);
}

// The largest of logits in memory words; NaN loses. Two logits of 16 bits are compared at once.
template <class E>
class Maximum {
 public:
  static constexpr int N = kGroup<E>;
  __device__ __forceinline__ void add(const Words<E, N>& words) {
#pragma unroll
    for (const uint32_t word : words.word) {
      if constexpr (N == 4) {
        value_ = fmaxf(value_, E::load(word));
      } else {
        pair_ = E::larger(pair_, word);
      }
    }
  }
  __device__ __forceinline__ float value() const {
    if constexpr (N == 4) {
      return value_;
    } else {
      return fmaxf(E::low(pair_), E::high(pair_));
    }
  }

 private:
  float value_ = -INFINITY;
  uint32_t pair_ = E::kMinusInfinities;
};

// One model's part of a row. `max` is m if kExact, otherwise m log2(e) / T rounded, which is the
// unit of the exponents of 2. A NaN is ignored by `max` and kept by `total`. A part without a logit
// above -inf has total 0.
//
// With kExact the largest logit has a power of 1, and a nearly certain distribution keeps its
// digits, which entropies and float32 gradients need. Without it a logit takes one operation less,
// and `rest` corrects the last bits, whose error all probabilities of a row share.
template <bool kExact>
struct SoftmaxPart {
  float max = kLowest;
  float total = 0.0f;

  // Converts a maximum y to the unit of `max`. `exponent` is log2(e) / T.
  static __device__ __forceinline__ float unit(float y, float exponent) {
    return fmaxf(kLowest, kExact ? y : y * exponent);
  }
  template <int N>
  __device__ __forceinline__ void add(const Group<N>& y, float exponent) {
    Group<N> powers;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      powers.x[i] = exp2_fast(kExact ? (y.x[i] - max) * exponent : fmaf(y.x[i], exponent, -max));
    }
    total += sum(powers);
  }
  __device__ __forceinline__ void raise(float top, float exponent) {
    total *= exp2_fast((max - top) * (kExact ? exponent : 1.0f));
    max = top;
  }
};

// The parts of both models, which warps and blocks exchange.
template <bool kExact>
struct alignas(16) RowPart {
  SoftmaxPart<kExact> student;
  SoftmaxPart<kExact> teacher;

  // Makes both parts relative to the largest maximum of all lanes.
  __device__ __forceinline__ void raise_to_warp(float exponent) {
    student.raise(warp_all(student.max, larger_of), exponent);
    teacher.raise(warp_all(teacher.max, larger_of), exponent);
  }

  // Merges the parts of all lanes.
  __device__ __forceinline__ RowPart over_warp(float exponent) const {
    RowPart all = *this;
    all.raise_to_warp(exponent);
    all.student.total = warp_all(all.student.total, sum_of);
    all.teacher.total = warp_all(all.teacher.total, sum_of);
    return all;
  }
};

// Computes probabilities from logits and the softmax of the whole row: log2 p = power - shift.
template <bool kExact>
struct Normalizer {
  float max;      // subtracted from y first, if kExact
  float shift;    // subtracted from the power
  float inverse;  // 1 / total
  float rest;     // the rounding error of `shift`, unless kExact: p is 2^rest times too large

  __device__ explicit Normalizer(const SoftmaxPart<kExact>& part)
      : max(part.max), inverse(1.0f / part.total) {
    // The exponent is split off, because the logarithm of a number near 1 has more digits.
    const int bits = __float_as_int(part.total);
    const int exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest is in [sqrt(1/2), sqrt(2))
    const bool normal = part.total >= 0x1p-126f && part.total < INFINITY;
    const float low = log2f(normal ? __int_as_float(bits - exponent * (1 << 23)) : part.total);
    const float high = normal ? static_cast<float>(exponent) : 0.0f;
    // Computes max + high + low as a sum of two numbers.
    const float base = kExact ? 0.0f : part.max;
    const float upper = base + high;
    const float of_high = upper - base;
    const float lower = (base - (upper - of_high)) + (high - of_high);
    shift = upper + low;
    rest = normal ? ((upper - shift) + low) + lower : 0.0f;
  }
  Normalizer() = default;

  // Returns the exponent of 2 of a logit; probability() makes p of 2 to this power.
  __device__ __forceinline__ float power(float y, float exponent) const {
    return kExact ? (y - max) * exponent : fmaf(y, exponent, -shift);
  }
  __device__ __forceinline__ float probability(float power_of_two) const {
    return kExact ? power_of_two * inverse : power_of_two;
  }
};

// The first of the largest unscaled logits; index INT32_MAX if none is above -inf.
struct Largest {
  float value = -INFINITY;
  int index = INT32_MAX;

  __device__ __forceinline__ void add(const Largest& other) {
    if (other.value > value || (other.value == value && other.index < index)) *this = other;
  }

  // If all are -inf, the first one counts.
  __device__ __forceinline__ int place() const { return value == -INFINITY ? 0 : index; }
};

}  // namespace leaf::cuda
