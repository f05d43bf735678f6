#pragma once

// Rows of logits, and of their gradients, in groups of eight, the elements that a thread handles at
// once.
//
// Group g holds the elements [8 g - pad, 8 g - pad + 8), pad being chosen so that groups start at
// multiples of 16 bytes in the student's memory, whatever the row's address. Only the first and the
// last group of a row may be partial.

#include "device.cuh"
#include "element.cuh"
#include "leaf/dual_kl.h"

namespace leaf::cuda {

constexpr int kGroup = 8;

// Stands for the maximum of no logits: finite, so that no -inf - (-inf) arises.
constexpr float kLowest = -3.402823466e38f;

// The element type where only the run-time dtype tells it.
struct AnyElement {};

template <class E, class Visit>
__device__ __forceinline__ void with_type(DType dtype, const Visit& visit) {
  if constexpr (!std::is_same_v<E, AnyElement>) {
    visit(E{});
  } else if (dtype == DType::kFloat32) {
    visit(Float32{});
  } else if (dtype == DType::kFloat16) {
    visit(Float16{});
  } else {
    visit(BFloat16{});
  }
}

template <class E>
__device__ __forceinline__ int64_t bytes_of(DType dtype) {
  if constexpr (std::is_same_v<E, AnyElement>)
    return size_of(dtype);
  else
    return sizeof(typename E::Bits);
}

struct Group {
  float x[kGroup];
};

// 16 bytes hold kGroup elements of 16 bits, or half as many of 32.
template <class E>
__device__ __forceinline__ void unpack(const uint4* words, Group& group) {
  using Bits = typename E::Bits;
  constexpr int kParts = kGroup * sizeof(Bits) / sizeof(uint4);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const uint4 quad = words[part];
    const uint32_t word[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Bits) == 4) {
        group.x[4 * part + i] = E::load(word[i]);
      } else {
        group.x[2 * i] = E::load(static_cast<Bits>(word[i]));
        group.x[2 * i + 1] = E::load(static_cast<Bits>(word[i] >> 16));
      }
    }
  }
}

template <class E>
__device__ __forceinline__ void pack(const Group& group, uint4* words) {
  using Bits = typename E::Bits;
  constexpr int kParts = kGroup * sizeof(Bits) / sizeof(uint4);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Bits) == 4) {
        word[i] = E::store(group.x[4 * part + i]);
      } else {
        word[i] = E::store(group.x[2 * i]) | static_cast<uint32_t>(E::store(group.x[2 * i + 1]))
                                                 << 16;
      }
    }
    // Not read again here: the cache is for others.
    __stcs(words + part, make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// Where the groups of a row lie, for both models and the gradient alike.
struct Grouping {
  int width;  // elements of the row
  int pad;

  __device__ int count() const { return (width + pad + kGroup - 1) / kGroup; }
  __device__ int first(int group) const { return group * kGroup - pad; }
  __device__ bool has(int element) const {
    return static_cast<unsigned>(element) < static_cast<unsigned>(width);
  }
  __device__ bool whole(int group) const {
    return has(first(group)) && has(first(group) + kGroup - 1);
  }
};

// The pad of a row: its distance from the multiple of 16 bytes before it, in elements.
__device__ __forceinline__ int row_pad(const void* base, DType dtype, int64_t row, int64_t stride) {
  const int64_t size = size_of(dtype);
  return static_cast<int>((reinterpret_cast<uintptr_t>(base) + row * stride * size) % 16 / size);
}

// A row in memory, logits or gradient.
template <class E>
struct RowOf {
  char* data;
  DType dtype;
  bool aligned;  // groups start at multiples of 16 bytes

  __device__ RowOf(const void* base, DType type, int64_t row, int64_t stride, int pad)
      : data(static_cast<char*>(const_cast<void*>(base)) + row * stride * bytes_of<E>(type)),
        dtype(type),
        aligned((reinterpret_cast<uintptr_t>(data) - pad * bytes_of<E>(type)) % 16 == 0) {}

  __device__ int group_bytes() const { return static_cast<int>(kGroup * bytes_of<E>(dtype)); }
  __device__ char* at(int element) const { return data + element * bytes_of<E>(dtype); }
};

// The elements of a group as they lie in memory, to `slot`, which is a multiple of 16 in shared
// memory; -inf where the row has none. This thread sees them after wait_for_copies().
template <class E>
__device__ __forceinline__ void copy_group(const RowOf<E>& row, const Grouping& grouping, int group,
                                           char* slot) {
  const int first = grouping.first(group);
  if (row.aligned && grouping.whole(group)) {
    for (int byte = 0; byte < row.group_bytes(); byte += 16) {
      copy_16_bytes(slot + byte, row.at(first) + byte);
    }
    return;
  }
  with_type<E>(row.dtype, [&](auto element) {
    using T = decltype(element);
    auto* to = reinterpret_cast<typename T::Bits*>(slot);
    const auto* from = reinterpret_cast<const typename T::Bits*>(row.data);
    for (int i = 0; i < kGroup; ++i) {
      const int e = first + i;
      to[i] = grouping.has(e) ? from[e] : T::store(-INFINITY);
    }
  });
}

template <class E>
__device__ __forceinline__ Group read_slot(const RowOf<E>& row, const char* slot) {
  Group group;
  with_type<E>(row.dtype, [&](auto element) {
    unpack<decltype(element)>(reinterpret_cast<const uint4*>(slot), group);
  });
  return group;
}

template <class E>
__device__ __forceinline__ Group read_group(const RowOf<E>& row, const Grouping& grouping,
                                            int index) {
  const int first = grouping.first(index);
  if (row.aligned && grouping.whole(index)) return read_slot(row, row.at(first));
  Group group;
  with_type<E>(row.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* from = reinterpret_cast<const typename T::Bits*>(row.data);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int e = first + i;
      group.x[i] = grouping.has(e) ? T::load(from[e]) : -INFINITY;
    }
  });
  return group;
}

template <class E>
__device__ __forceinline__ void write_group(const RowOf<E>& row, const Grouping& grouping,
                                            int index, const Group& group) {
  const int first = grouping.first(index);
  const bool whole = row.aligned && grouping.whole(index);
  with_type<E>(row.dtype, [&](auto element) {
    using T = decltype(element);
    if (whole) {
      pack<T>(group, reinterpret_cast<uint4*>(row.at(first)));
      return;
    }
    auto* to = reinterpret_cast<typename T::Bits*>(row.data);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int e = first + i;
      if (grouping.has(e)) to[e] = T::store(group.x[i]);
    }
  });
}

// Zeroes bytes by the threads `index`, `index` + 1, ... of `count`; begin and bytes are even.
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
