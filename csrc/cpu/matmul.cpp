// Products of bfloat16 matrices into float32 with AMX.
//
// Factors are packed into tiles, with zeros at their edges: a factor that all blocks of the product
// need once for all, another one block by block in the second level of the cache.

#include "leaf/matmul.h"

#include <algorithm>

#include "amx.h"
#include "scratch.h"

namespace leaf::cpu {

#ifdef LEAF_AMX
namespace {

using namespace amx;

// A factor as the kernel reads it: groups of 16 lines, whose tiles follow each other along k.
struct Factor {
  const uint16_t* data;
  int64_t stride;
  bool contiguous_lines;
  bool interleaved;  // the tiles of b
  int64_t lines, depth;

  int64_t packed_size(int64_t some, int64_t deep) const {
    return up(some, kPair) * up(deep, kDepth);
  }

  // Packs the lines [line, line + some) by the elements [start, start + deep); `to` has space for
  // an even number of groups.
  void pack(int64_t line, int64_t some, int64_t start, int64_t deep, uint16_t* to) const {
    const auto tile = contiguous_lines
                          ? (interleaved ? pack_tile<true, true> : pack_tile<true, false>)
                          : (interleaved ? pack_tile<false, true> : pack_tile<false, false>);
    const int64_t end = std::min(lines, line + some), last = std::min(depth, start + deep);
    const int64_t tiles = up(deep, kDepth) / kDepth;
    const auto pack_one = [&](int64_t i, int64_t k) {
      const int64_t at =
          contiguous_lines ? (line + i) * stride + start + k : (start + k) * stride + line + i;
      const int64_t left = std::max<int64_t>(0, end - line - i);
      tile(data + (left > 0 ? at : 0), stride, left, last - start - k,
           to + (i / kSide * tiles + k / kDepth) * kTile);
    };
    // In the order of the memory.
    if (contiguous_lines) {
      for (int64_t i = 0; i < up(some, kPair); i += kSide) {
        for (int64_t k = 0; k < deep; k += kDepth) pack_one(i, k);
      }
    } else {
      for (int64_t k = 0; k < deep; k += kDepth) {
        for (int64_t i = 0; i < up(some, kPair); i += kSide) pack_one(i, k);
      }
    }
  }
};

// A factor of which all blocks of a product need everything.
struct Whole {
  Whole(const Factor& factor, bool packs, const Threads& threads)
      : memory(packs ? factor.packed_size(factor.lines, factor.depth) / 2 : 0) {
    if (!packs) return;
    threads.for_ranges(up(factor.lines, kPair) / kPair, 1, [&](int64_t begin, int64_t end) {
      const int64_t line = begin * kPair;
      factor.pack(line, (end - begin) * kPair, 0, factor.depth,
                  data() + line * up(factor.depth, kDepth));
    });
  }
  uint16_t* data() const { return reinterpret_cast<uint16_t*>(memory.data()); }

  Scratch memory;
};

// A product, cut into blocks of m x n sums, each made in steps of `depth` along k.
class Product {
 public:
  Product(const MatmulParams& params, const Threads& threads)
      : params_(params),
        a_{params.a.data, params.a.stride, !params.a.transposed, false, params.m, params.k},
        b_{params.b.data, params.b.stride, params.b.transposed, true, params.n, params.k} {
    constexpr int64_t kMostWhole = 1 << 24;  // elements
    a_whole_ = params.m * params.k <= kMostWhole;
    b_whole_ = params.n * params.k <= kMostWhole;
    // The sizes are the fastest for logits, and for gradients of hidden states and of a head, with
    // a second level of 2 MiB. The sums of a block of up to 512 rows stay there during the steps.
    const bool neither = !a_whole_ && !b_whole_;
    const int64_t most = neither ? 320 : 640;
    const int64_t steps = std::max<int64_t>(1, (params.k + most - 1) / most);
    depth_ = steps > 1 ? up((params.k + steps - 1) / steps, kDepth) : params.k;
    m_ = neither ? 512 : a_whole_ && !b_whole_ ? 1024 : 384;
    n_ = neither ? 288 : b_whole_ && !a_whole_ ? 1024 : 384;
    m_ = std::min(m_, up(params.m, kPair));
    n_ = std::min(n_, up(params.n, kPair));
    while (blocks() < threads.count && std::max(m_, n_) > kPair) {
      int64_t& larger = m_ > n_ ? m_ : n_;
      larger = up(larger / 2, kPair);
    }
  }

  void run(const Threads& threads) const {
    const Whole a(a_, a_whole_, threads), b(b_, b_whole_, threads);
    const int64_t a_size = a_whole_ ? 0 : a_.packed_size(m_, depth_);
    const int64_t b_size = b_whole_ ? 0 : b_.packed_size(n_, depth_);
    const int64_t sums = (in_steps() ? up(m_, kPair) : kPair) * up(n_, kPair);
    threads.for_ranges(blocks(), 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(sums + (a_size + b_size) / 2);
      configure();
      auto* packed = reinterpret_cast<uint16_t*>(scratch.data() + sums);
      for (int64_t i = begin; i < end; ++i) {
        block(i / columns() * m_, i % columns() * n_, a, b, scratch.data(), packed,
              packed + a_size);
      }
      release();
    });
  }

 private:
  int64_t rows() const { return (params_.m + m_ - 1) / m_; }
  int64_t columns() const { return (params_.n + n_ - 1) / n_; }
  int64_t blocks() const { return rows() * columns(); }
  bool in_steps() const { return depth_ < params_.k; }

  // Computes the block of sums at a row and a column. The last three arguments are workspaces.
  void block(int64_t row, int64_t column, const Whole& a_whole, const Whole& b_whole, float* sums,
             uint16_t* a, uint16_t* b) const {
    const int64_t m = std::min(m_, params_.m - row), n = std::min(n_, params_.n - column);
    const int64_t all = up(params_.k, kDepth);
    int64_t start = 0;
    do {  // once also where k is 0, and all sums are 0
      const int64_t deep = std::min(depth_, params_.k - start);
      const int64_t a_depth = a_whole_ ? all : up(deep, kDepth);
      const int64_t b_depth = b_whole_ ? all : up(deep, kDepth);
      const uint16_t* a_packed = a_whole_ ? a_whole.data() + row * all + start * kSide : a;
      const uint16_t* b_packed = b_whole_ ? b_whole.data() + column * all + start * kSide : b;
      if (!a_whole_) a_.pack(row, m, start, deep, a);
      if (!b_whole_) b_.pack(column, n, start, deep, b);
      for (int64_t i = 0; i < m; i += kPair) {
        const Groups groups{a_packed + i * a_depth, b_packed, kSide * a_depth, kSide * b_depth,
                            up(deep, kDepth) / kDepth};
        strip(groups, row + i, std::min(kPair, m - i), column, n, start,
              in_steps() ? sums + i * up(n, kPair) : sums);
      }
      start += deep;
    } while (start < params_.k);
  }

  // Adds a step to a strip of at most 32 rows of a block, and stores it after the last one.
  void strip(Groups groups, int64_t row, int64_t m, int64_t column, int64_t n, int64_t start,
             float* sums) const {
    const int64_t b_pair = 2 * groups.b_second;
    if (params_.out_is_float32 && m == kPair && n % kPair == 0) {  // the sums are those of `out`
      float* out = static_cast<float*>(params_.out) + row * params_.out_stride + column;
      for (int64_t j = 0; j < n; j += kPair, groups.b += b_pair) {
        multiply(groups, start > 0 || params_.add, params_.add, out + j, params_.out_stride);
      }
      return;
    }
    const int64_t width = up(n, kPair);
    const auto at = [&](int64_t i) { return (row + i) * params_.out_stride + column; };
    if (params_.add && start == 0) {  // the sums begin with `out`, as above
      for (int64_t i = 0; i < m; ++i) {
        std::copy_n(static_cast<const float*>(params_.out) + at(i), n, sums + i * width);
      }
    }
    for (int64_t j = 0; j < n; j += kPair, groups.b += b_pair) {
      multiply(groups, start > 0 || params_.add, false, sums + j, width);
    }
    if (start + depth_ < params_.k) return;
    for (int64_t i = 0; i < m; ++i) {
      if (params_.out_is_float32) {
        std::copy_n(sums + i * width, n, static_cast<float*>(params_.out) + at(i));
      } else {
        round_row(sums + i * width, n, static_cast<uint16_t*>(params_.out) + at(i));
      }
    }
  }

  MatmulParams params_;
  Factor a_, b_;
  bool a_whole_, b_whole_;
  int64_t m_, n_, depth_;
};

}  // namespace

bool has_amx() {
  static const bool found = amx::request();
  return found;
}

void matmul(const MatmulParams& params, const Threads& threads) {
  if (params.m == 0 || params.n == 0) return;
  const Product product(params, threads);
  product.run(threads);
}

#else

bool has_amx() { return false; }
void matmul(const MatmulParams&, const Threads&) {}

#endif

}  // namespace leaf::cpu
