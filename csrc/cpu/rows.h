#pragma once

// The rows of a loss over logits: which ones count, how threads share them, and what the others
// get. `Params` is a loss's parameters: the student's logits, row weights and results.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "leaf/logits.h"
#include "leaf/threads.h"
#include "softmax.h"
#include "subnormals.h"
#include "zero.h"

namespace leaf::cpu {

// The factor of the slope dD/dx_s in a row's gradient, without the derivative of the softcap.
template <class Params>
float gradient_factor(const Params& params, int64_t row) {
  return params.row_weight[row] * params.temperature * params.student.scale;
}

// Zeroes a row's gradient from element `begin` on.
template <class Params>
void zero_gradient(const Params& params, int64_t row, int64_t begin, bool uncached) {
  if (params.grad == nullptr || begin == params.student.vocab) return;
  const DType dtype = params.student.dtype;
  void* grad = offset(params.grad, row * params.grad_row_stride + begin, dtype);
  const auto bytes = static_cast<size_t>((params.student.vocab - begin) * size_of(dtype));
  if (uncached) {
    zero_uncached(grad, bytes);
  } else {
    std::memset(grad, 0, bytes);
  }
}

template <class Params>
void skip_row(const Params& params, int64_t row, bool uncached) {
  zero_gradient(params, row, 0, uncached);
  if (params.row_results == nullptr) return;
  for (int64_t i = 0; i < 4; ++i) params.row_results[i * params.rows + row] = 0.0f;
}

// Returns the power of two that scales the largest possible entry of a float16 gradient into
// (2^14, 2^15]: below overflow and as far from underflow as possible.
template <class Params>
float float16_gradient_scale(const Params& params, const std::vector<int64_t>& live) {
  if (params.grad == nullptr || params.student.dtype != DType::kFloat16) return 1.0f;
  float largest = 0.0f;
  for (const int64_t row : live) {
    largest = std::max(largest, std::fabs(gradient_factor(params, row)));
  }
  largest *= params.slope_bound;
  if (largest == 0.0f || !std::isfinite(largest)) return 1.0f;
  const int exponent = 15 - static_cast<int>(std::ceil(std::log2(largest)));
  return std::ldexp(1.0f, std::clamp(exponent, -126, 126));
}

// Computes the rows and the loss. RowKernel(params, kl).run(row, for_blocks) stores the divergence
// of a row in kl[row]; a row has the blocks of `vocab` logits.
template <class RowKernel, class Params>
void run_rows(const Params& params, int64_t vocab, const Threads& threads) {
  std::vector<int64_t> live;
  std::vector<int64_t> dropped;
  for (int64_t row = 0; row < params.rows; ++row) {
    (params.row_weight[row] != 0.0f ? live : dropped).push_back(row);
  }
  *params.grad_scale = float16_gradient_scale(params, live);
  std::vector<double> kl(params.rows, 0.0);

  // Rows that divide evenly among the threads are computed by one thread each. The threads share
  // the blocks of each remaining row. Both paths do the same arithmetic in the same order.
  const auto rows = static_cast<int64_t>(live.size());
  const int64_t blocks = SoftmaxRow::block_count(vocab);
  constexpr int64_t kWorthwhile = 2 * kRowBlock;  // elements; fewer do not repay waking a thread
  const bool share = blocks * kRowBlock >= 2 * kWorthwhile;
  const int64_t whole = share ? rows - rows % threads.count : rows;
  const int64_t grain = std::max<int64_t>(1, kWorthwhile / vocab);
  threads.for_ranges(whole, grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    RowKernel kernel(params, kl.data());
    const auto here = [](int64_t n, const auto& body) { body(0, n); };
    for (int64_t i = begin; i < end; ++i) kernel.run(live[i], here);
  });
  if (whole < rows) {
    const FlushSubnormals flush;
    RowKernel kernel(params, kl.data());
    const auto on_threads = [&](int64_t n, const auto& body) {
      threads.for_ranges(n, kWorthwhile / kRowBlock, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush_here;
        body(begin, end);
      });
    };
    for (int64_t i = whole; i < rows; ++i) kernel.run(live[i], on_threads);
  }
  const auto skipped = static_cast<int64_t>(dropped.size());
  constexpr int64_t kUncached = int64_t{1} << 25;  // bytes, more than a core's share of most caches
  const bool uncached = skipped * params.student.vocab * size_of(params.student.dtype) >= kUncached;
  threads.for_ranges(skipped, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) skip_row(params, dropped[i], uncached);
  });

  double loss = 0.0;
  for (const int64_t row : live) loss += static_cast<double>(params.row_weight[row]) * kl[row];
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
}

}  // namespace leaf::cpu
