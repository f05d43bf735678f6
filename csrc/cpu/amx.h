#pragma once

// AMX: tile registers of 16 rows of 64 bytes. One instruction adds the product of a tile of a,
// 16 x 32 bfloat16, and a tile of b, 32 x 16 of which each two rows are interleaved, to a tile of
// 16 x 16 float32. It takes subnormal values for 0.

#if defined(__linux__) && defined(__x86_64__) && __GNUC__ >= 12 && !defined(__clang__)
#define LEAF_AMX

// GCC 12 takes the unset operands in this header for mistakes (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#define LEAF_AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16,bmi2")))

namespace leaf::cpu::amx {

constexpr int64_t kSide = 16;              // rows of a tile
constexpr int64_t kDepth = 32;             // bfloat16 in a row of a tile
constexpr int64_t kTile = kSide * kDepth;  // bfloat16 in a tile
constexpr int64_t kPair = 2 * kSide;       // `multiply` computes 2 x 2 tiles of sums

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Returns whether the machine has AMX, and asks the system to let this process use it.
inline bool request() {
  const bool there = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("bmi2");
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Each thread configures its tiles before the functions below, and releases them.
LEAF_AMX_TARGET inline void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kSide;
  }
  asm volatile("" : : "r"(&config) : "memory");  // some compilers do not see the load
  _tile_loadconfig(&config);
}

LEAF_AMX_TARGET inline void release() {
  _tile_release();
  _mm_sfence();  // streamed lines come before what another thread then reads
}

// Transposes 16 x 16 words.
LEAF_AMX_TARGET inline void transpose(__m512i* rows) {
  __m512i half[kSide];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xdd);
  }
}

// The mask of the first n of 32 elements.
LEAF_AMX_TARGET inline __mmask32 first_of(int64_t n) {
  return n >= kDepth ? ~__mmask32{0} : _bzhi_u32(~0u, static_cast<unsigned>(n));
}

// Packs one tile: 16 lines of a factor, which are rows of a or columns of b, by 32 of their
// elements. Lines from `lines` on and elements from `depth` on become zeros.
template <bool kContiguousLines, bool kInterleaved>
LEAF_AMX_TARGET void pack_tile(const uint16_t* from, int64_t stride, int64_t lines, int64_t depth,
                               uint16_t* to) {
  __m512i rows[kSide];
  if constexpr (kContiguousLines) {  // a row holds 16 pairs of a line's elements
    const __mmask32 mask = first_of(depth);
    for (int64_t i = 0; i < kSide; ++i) {
      rows[i] =
          i < lines ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
    }
  } else {  // a row holds one pair of elements of 16 lines
    const auto mask = static_cast<__mmask16>(first_of(std::min(lines, kSide)));
    const auto row = [&](int64_t i) LEAF_AMX_TARGET {
      const auto read = static_cast<__mmask16>(i < depth ? mask : 0);
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, from + i * stride));
    };
    for (int64_t i = 0; i < kSide; ++i) {
      rows[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
    }
  }
  if constexpr (kContiguousLines == kInterleaved) transpose(rows);
  for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kDepth, rows[i]);
}

// The factors of a product of 32 x 32 sums. Each is two groups of 16 lines, packed: `tiles` tiles
// along k, and the second group's tiles so many elements after the first's.
struct Groups {
  const uint16_t *a, *b;
  int64_t a_second, b_second, tiles;
};

// Writes the product to 32 x 32 sums, or adds it. With `prefetch` the sums right of these are
// fetched in the meantime: the processor does not see by itself that their rows come next.
LEAF_AMX_TARGET inline void multiply(const Groups& groups, bool add, bool prefetch, float* sums,
                                     int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* lower = sums + kSide * stride;
  asm volatile("" : : : "memory");  // GCC 12's loads of tiles do not say that they read memory
  if (add) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kSide, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto next = reinterpret_cast<uintptr_t>(sums + kPair);  // the address may be invalid
  const int64_t step =
      prefetch ? (kPair + groups.tiles - 1) / std::max<int64_t>(groups.tiles, 1) : 0;
  int64_t row = 0;
  for (int64_t i = 0; i < groups.tiles * kTile; i += kTile) {
    for (const int64_t end = std::min(row + step, kPair); row < end; ++row) {
      const auto line = next + static_cast<uintptr_t>(row * bytes);
      __builtin_prefetch(reinterpret_cast<const void*>(line), 1);
      __builtin_prefetch(reinterpret_cast<const void*>(line + 64), 1);
    }
    _tile_loadd(4, groups.a + i, 64);
    _tile_loadd(6, groups.b + i, 64);
    _tile_loadd(7, groups.b + groups.b_second + i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, groups.a + groups.a_second + i, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kSide, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kSide, bytes);
}

// Rounds n floats of a row, from aligned memory, to bfloat16.
LEAF_AMX_TARGET inline void round_row(const float* sums, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kDepth) {
    const auto rounded = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + i + kSide), _mm512_load_ps(sums + i)));
    if (n - i >= kDepth && reinterpret_cast<uintptr_t>(out + i) % 64 == 0) {
      // A whole line, which is not read from memory first.
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), rounded);
    } else {
      _mm512_mask_storeu_epi16(out + i, first_of(n - i), rounded);
    }
  }
}

}  // namespace leaf::cpu::amx

#endif
