#pragma once

// Rows of logits and of their gradients, in groups. A group is 16 bytes of logits, which a thread
// handles at once: eight elements of 16 bits or four of 32.
//
// Group g of N elements covers [N g - pad, N g - pad + N). The pad makes groups start at multiples
// of 16 bytes in the student's memory, for every address of a row. Only the first and the last
// group of a row may be partial.

#include <type_traits>

#include "device.cuh"
#include "element.cuh"
#include "leaf/dual_kl.h"

namespace leaf::cuda {

template <class E>
constexpr int kGroup = 16 / sizeof(typename E::Bits);

// The maximum of an empty set of logits. It is finite, so that -inf - (-inf) does not arise.
constexpr float kLowest = -3.402823466e38f;

template <int N>
struct Group {
  float x[N];
};

// The words of N elements in memory: N / 2 words for 16 bits, N words for 32.
template <class E, int N>
struct Words {
  static constexpr int kCount = N * sizeof(typename E::Bits) / 4;
  uint32_t word[kCount];

  __device__ __forceinline__ Group<N> unpacked() const {
    Group<N> group;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kCount == N) {
        group.x[i] = E::load(word[i]);
      } else {
        group.x[2 * i] = E::low(word[i]);
        group.x[2 * i + 1] = E::high(word[i]);
      }
    }
    return group;
  }
};

template <class E, int N>
__device__ __forceinline__ Words<E, N> packed(const Group<N>& group) {
  Words<E, N> words;
#pragma unroll
  for (int i = 0; i < words.kCount; ++i) {
    if constexpr (words.kCount == N) {
      words.word[i] = E::store(group.x[i]);
    } else {
      words.word[i] = E::pair(group.x[2 * i], group.x[2 * i + 1]);
    }
  }
  return words;
}

// Aligned to 16 bytes, or to their own size if that is less.
template <class E, int N>
__device__ __forceinline__ Words<E, N> load_words(const void* from) {
  Words<E, N> words;
  if constexpr (words.kCount == 2) {
    const uint2 pair = *static_cast<const uint2*>(from);
    words.word[0] = pair.x;
    words.word[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < words.kCount; i += 4) {
      const uint4 quad = static_cast<const uint4*>(from)[i / 4];
      words.word[i] = quad.x;
      words.word[i + 1] = quad.y;
      words.word[i + 2] = quad.z;
      words.word[i + 3] = quad.w;
    }
  }
  return words;
}

// Stores data that the kernel does not read again, without keeping it in the cache.
template <class E, int N>
__device__ __forceinline__ void store_words(void* to, const Words<E, N>& words) {
  const uint32_t (&w)[Words<E, N>::kCount] = words.word;
  if constexpr (words.kCount == 2) {
    __stcs(static_cast<uint2*>(to), make_uint2(w[0], w[1]));
  } else {
#pragma unroll
    for (int i = 0; i < words.kCount; i += 4) {
      __stcs(static_cast<uint4*>(to) + i / 4, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
    }
  }
}

// The groups of a row. They are the same for both models and the gradient.
template <int N>
struct Grouping {
  int width;  // elements of the row
  int pad;

  __device__ int count() const { return (width + pad + N - 1) / N; }
  __device__ int first(int group) const { return group * N - pad; }
  __device__ bool has(int element) const {
    return static_cast<unsigned>(element) < static_cast<unsigned>(width);
  }
  // The groups [whole_begin, whole_end) are whole; the others of the row are partial.
  __device__ int whole_begin() const { return pad > 0 ? 1 : 0; }
  __device__ int whole_end() const { return (width + pad) / N; }
  __device__ bool whole(int group) const { return group >= whole_begin() && group < whole_end(); }
};

// Returns the pad of a row: its distance from the multiple of 16 bytes before it, in elements.
template <class E>
__device__ __forceinline__ int row_pad(const void* base, int64_t row, int64_t stride) {
  constexpr unsigned kSize = sizeof(typename E::Bits);
  const auto address = reinterpret_cast<uintptr_t>(base) + row * stride * kSize;
  return static_cast<int>(static_cast<unsigned>(address) % 16 / kSize);
}

// Returns whether groups of `group_bytes`, the first of which starts `pad` bytes before the
// address, are aligned for one load or store each.
__device__ __forceinline__ bool is_aligned(const void* row, unsigned pad, unsigned group_bytes) {
  const unsigned mask = (group_bytes < 16 ? group_bytes : 16) - 1;  // both are powers of two
  return ((static_cast<unsigned>(reinterpret_cast<uintptr_t>(row)) - pad) & mask) == 0;
}

// A row in memory, logits or gradient, in groups of N.
template <class E, int N>
struct RowOf {
  using Bits = typename E::Bits;

  Bits* data;
  bool aligned;  // a group is one load or store

  __device__ RowOf(const void* base, int64_t row, int64_t stride, int pad)
      : data(static_cast<Bits*>(const_cast<void*>(base)) + row * stride),
        aligned(is_aligned(data, pad * sizeof(Bits), N * sizeof(Bits))) {}

  __device__ __forceinline__ Words<E, N> read(const Grouping<N>& grouping, int group) const {
    const int first = grouping.first(group);
    if (aligned && grouping.whole(group)) return load_words<E, N>(data + first);
    Group<N> x;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x.x[i] = grouping.has(first + i) ? E::load(data[first + i]) : -INFINITY;
    }
    return packed<E, N>(x);
  }

  __device__ __forceinline__ void write(const Grouping<N>& grouping, int group,
                                        const Group<N>& x) const {
    const int first = grouping.first(group);
    if (aligned && grouping.whole(group)) {
      store_words<E, N>(data + first, packed<E, N>(x));
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (grouping.has(first + i)) data[first + i] = E::store(x.x[i]);
    }
  }
};

// Zeroes bytes with `count` threads, of which this one is `index`. `begin` and `bytes` are even.
__device__ __forceinline__ void zero_bytes(char* begin, int64_t bytes, int64_t index,
                                           int64_t count) {
  const int64_t gap = (16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16;
  const int64_t head = gap < bytes ? gap : bytes;
  const int64_t body = (bytes - head) / 16;
  auto* words = reinterpret_cast<uint4*>(begin + head);
  for (int64_t i = index; i < body; i += count) __stcs(words + i, make_uint4(0, 0, 0, 0));
  auto* first = reinterpret_cast<uint16_t*>(begin);
  for (int64_t i = index; i < head / 2; i += count) first[i] = 0;
  auto* last = reinterpret_cast<uint16_t*>(begin + head + 16 * body);
  for (int64_t i = index; i < (bytes - head - 16 * body) / 2; i += count) last[i] = 0;
}

}  // namespace leaf::cuda
