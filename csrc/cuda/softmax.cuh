#pragma once

// The softmax of a row that many threads hold parts of, and its largest logit.
//
// With y the scaled, capped logit: a part is its maximum m and its sum d = sum exp((y - m) / T).
// Parts are merged as soon as they meet, so that a row needs one exchange between threads and
// blocks.

#include "logits.cuh"

namespace leaf::cuda {

constexpr float kLog2e = 1.44269504088896341f;

// What makes y of a logit z: softcap * tanh(scale * z / softcap), or scale * z where softcap is 0.
struct Activation {
  float scale;
  float softcap;

  // Elements that the row does not have stay -inf.
  __device__ __forceinline__ void apply(const Grouping& grouping, int index, Group& group) const {
    if (softcap != 0.0f) {
      const float inner = scale / softcap;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float y = softcap * tanhf(group.x[i] * inner);
        group.x[i] = grouping.has(grouping.first(index) + i) ? y : -INFINITY;
      }
    } else if (scale != 1.0f) {
#pragma unroll
      for (float& x : group.x) x *= scale;
    }
  }

  // dy/d(scale z) of the y of a group, times `value`.
  __device__ __forceinline__ void multiply_slope(const Group& y, Group& value) const {
    if (softcap == 0.0f) return;
    const float inverse = 1.0f / softcap;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float tanh = y.x[i] * inverse;
      value.x[i] *= (1.0f - tanh) * (1.0f + tanh);
    }
  }
};

__device__ __forceinline__ float largest(const Group& group) {
  const float (&x)[kGroup] = group.x;
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])),
               fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}

__device__ __forceinline__ float sum(const Group& group) {
  const float (&x)[kGroup] = group.x;
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// A NaN does not show in `max`, but in `total`; a part without a logit above -inf has total 0.
struct SoftmaxPart {
  float max = kLowest;
  float total = 0.0f;

  // `exponent`: log2(e) / T
  __device__ __forceinline__ void add(const Group& y, float exponent) {
    const float top = fmaxf(max, largest(y));
    Group exps;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) exps.x[i] = exp2_fast((y.x[i] - top) * exponent);
    total = fmaf(total, exp2_fast((max - top) * exponent), sum(exps));
    max = top;
  }

  __device__ __forceinline__ SoftmaxPart merged(const SoftmaxPart& other, float exponent) const {
    SoftmaxPart both;
    both.max = fmaxf(max, other.max);
    both.total = total * exp2_fast((max - both.max) * exponent) +
                 other.total * exp2_fast((other.max - both.max) * exponent);
    return both;
  }
};

// The first of the largest logits, as they came.
struct Largest {
  float value = -INFINITY;
  int index = INT32_MAX;

  __device__ __forceinline__ void add(const Group& z, int first) {
    if (!(largest(z) > value)) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (z.x[i] > value) {
        value = z.x[i];
        index = first + i;
      }
    }
  }

  __device__ __forceinline__ Largest merged(const Largest& other) const {
    const bool mine = value > other.value || (value == other.value && index < other.index);
    return mine ? *this : other;
  }

  // Where all are -inf, the first one.
  __device__ __forceinline__ int place() const { return value == -INFINITY ? 0 : index; }
};

}  // namespace leaf::cuda
