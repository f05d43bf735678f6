// Per sequence, over the tokens of the domain and in float32, step by step:
//
//     s_hat = (s - min s) / (max s - min s)       for teacher and student; 0 where max = min
//     gap   = s_hat_teacher - weight s_hat_student
//     score = (gap - min gap) / (max gap - min gap)
//     confounder = prunable & (score <= cut) & (s_hat_teacher <= teacher_max)
//
// Every step rounds each value once, so that the masks equal those of every other backend. A span
// is a maximal run of confounders.
//
// On the logarithmic scale the gap is log t - weight log s of the models' shares t and s of their
// largest norm, at least kLogFloor. From a weight of 1/2 on it is log(t / s) - (weight - 1) log s,
// so that weights of 1 and 0 make no error in a gap that is equal everywhere. Here backends differ
// by the rounding of logarithms.
//
// One block processes a sequence of any length, in passes: the ranges of both models; the gap and
// its range; with the quantile rule, the digits of the rank; marks and spans. The gap is stored in
// the memory of the score.

#include "leaf/detect_spans.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "block.cuh"
#include "launch.cuh"
#include "radix.cuh"
#include "sequence.cuh"
#include "span_words.cuh"

namespace leaf::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Range {
  float low;
  float high;

  __device__ __forceinline__ void include(float x) {
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
  __device__ __forceinline__ float normalized(float x) const {
    const float width = high - low;
    return width > 0.0f ? __fdiv_rn(x - low, width) : 0.0f;
  }
  // The share of the largest value, on the logarithmic scale.
  __device__ __forceinline__ float share(float x) const {
    return high > 0.0f ? fmaxf(__fdiv_rn(x, high), kLogFloor) : 1.0f;
  }
};

__device__ __forceinline__ Range empty_range() { return {kInfinity, -kInfinity}; }

__device__ __forceinline__ Range both(const Range& a, const Range& b) {
  return {fminf(a.low, b.low), fmaxf(a.high, b.high)};
}

// The result of the first pass over a sequence's domain.
struct Domain {
  Range teacher;
  Range student;
  int tokens;
  int status;
};

struct Shared {
  Domain domains[kMaxWarps];
  Range ranges[kMaxWarps];
  Latest latest[kMaxWarps];
  int ints[kMaxWarps];
  int histogram[kBins];
  Digits digits;
};

__device__ __forceinline__ int64_t border(const DetectSpansParams& p, int64_t index) {
  // Offsets are unchecked, so they are clamped to the tensors.
  const int64_t offset = p.offsets == nullptr ? index * p.max_length : p.offsets[index];
  return smaller(larger(offset, int64_t{0}), p.tokens);
}

// Writes the results of tokens that belong to no sequence.
__device__ __forceinline__ void erase(const DetectSpansParams& p, int64_t begin, int64_t stop) {
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < stop; i += blockDim.x) {
    p.score[i] = kNaN;
    p.confounder[i] = 0;
  }
}

__device__ __forceinline__ Domain read_domain(const Sequence& sequence, Shared& shared) {
  Domain domain{empty_range(), empty_range(), 0, 0};
  // The loads do not depend on whether a token is in the domain, so that many are in flight. Here
  // the norms come from memory; later passes find them in a cache.
  sequence.for_tokens<4>([&](int token) {
    const int place = smaller(token, sequence.size - 1);
    const float teacher = sequence.teacher(place);
    const float student = sequence.student(place);
    const bool inside = sequence.in_domain(place) && place == token;
    if (!inside) return;
    domain.teacher.include(teacher);
    domain.student.include(student);
    domain.tokens += 1;
    if (!isfinite(teacher)) domain.status |= kTeacherNotFinite;
    if (!isfinite(student)) domain.status |= kStudentNotFinite;
  });
  const auto combine = [](const Domain& a, const Domain& b) {
    return Domain{both(a.teacher, b.teacher), both(a.student, b.student), a.tokens + b.tokens,
                  a.status | b.status};
  };
  return block_reduce(domain, combine, shared.domains);
}

__device__ __forceinline__ float gap_of(const DetectSpansParams& p, const Domain& domain,
                                        float teacher, float student) {
  if (p.scale == GapScale::kMinMax) {  // here the product is not fused with the subtraction
    const float product = __fmul_rn(p.weight, domain.student.normalized(student));
    return domain.teacher.normalized(teacher) - product;
  }
  const float s = domain.student.share(student);
  const float t = domain.teacher.share(teacher);
  return logf(p.scale == GapScale::kLogRatio ? __fdiv_rn(t, s) : t) - p.weight * logf(s);
}

__device__ __forceinline__ Range write_gap(const Sequence& sequence, const Domain& domain,
                                           Shared& shared) {
  Range range = empty_range();
  sequence.for_tokens<1>([&](int token) {
    if (!sequence.inside(token)) return;
    const float gap =
        gap_of(sequence.params, domain, sequence.teacher(token), sequence.student(token));
    sequence.score(token) = gap;
    range.include(gap);
  });
  return block_reduce(range, both, shared.ranges);
}

// Returns the score of rank floor(threshold n) among the n >= 1 tokens of the domain. Scores are in
// the order of their bits, because none but -0 is negative.
__device__ __forceinline__ float quantile(const Sequence& sequence, const Range& gap, int tokens,
                                          double threshold, Shared& shared) {
  const double wanted = threshold * tokens;
  const int last = tokens - 1;
  Digits digits{0, wanted >= last ? last : wanted > 0.0 ? static_cast<int>(wanted) : 0};
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
    shared.histogram[bin] = 0;
  }
  __syncthreads();
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    sequence.for_tokens<1>([&](int token) {
      if (!sequence.inside(token)) return;
      const float score = gap.normalized(sequence.score(token));
      count_digit(__float_as_uint(fabsf(score)), shift, digits, shared.histogram);
    });
    __syncthreads();
    if (warp_index() == 0) {
      const Digits next = next_digit(digits, shared.histogram);
      if (lane_index() == 0) shared.digits = next;
    }
    __syncthreads();
    digits = shared.digits;
  }
  return __uint_as_float(digits.prefix);
}

// The parameters that turn a gap into a score and a score into a mark.
struct Rule {
  Range gap;
  bool finite;
  float cut;
  Range teacher;
  float teacher_max;
};

__device__ __forceinline__ bool is_marked(const Sequence& sequence, const Rule& rule, int token,
                                          float score) {
  if (!(score <= rule.cut)) return false;  // false for NaN
  if (!sequence.prunable(token)) return false;
  return rule.teacher_max == kInfinity ||
         rule.teacher.normalized(sequence.teacher(token)) <= rule.teacher_max;
}

// Writes the scores and marks of a tile and returns this thread's word of marks.
__device__ __forceinline__ Word mark_tile(const Sequence& sequence, const Rule& rule, int tile) {
  Word word{(sequence.first_word(tile) + lane_index()) * kWarp, 0, 0};
  sequence.for_tile<1>(tile, [&](int i, int token) {
    const bool inside = sequence.inside(token);
    float score = kNaN;
    if (inside && rule.finite) score = rule.gap.normalized(sequence.score(token));
    const bool mark = inside && is_marked(sequence, rule, token, score);
    if (token < sequence.size) {
      sequence.score(token) = score;
      sequence.confounder(token) = mark ? 1 : 0;
    }
    const unsigned marks = __ballot_sync(kFullMask, mark);
    const unsigned walls = __ballot_sync(kFullMask, !inside);
    if (lane_index() == i) {
      word.marks = marks;
      word.walls = walls;
    }
  });
  return word;
}

__device__ __forceinline__ void write_span(int64_t* span, int64_t slot, int start, int stop) {
  span[2 * slot] = start;
  span[2 * slot + 1] = stop;
}

// Writes the marks and their runs and returns the number of runs.
__device__ __forceinline__ int write_spans(const DetectSpansParams& p, const Sequence& sequence,
                                           const Rule& rule, int64_t* span, Shared& shared) {
  // The latest positions in the finished tiles; equal in all threads.
  Latest done{-1, -1};
  int open = -1;
  int count = 0;
  for (int tile = 0; tile < sequence.words; tile += sequence.tile_words()) {
    const Word word = mark_tile(sequence, rule, tile);
    const Latest last{latest(word.marks, word.base, -1), latest(word.walls, word.base, -1)};
    const auto marks = block_scan(last, Latest{-1, -1}, later, shared.latest);
    const Latest before = later(done, marks.before);
    const unsigned starts = starts_of(word, before, p.join_gap);
    const auto opened = block_scan(latest(starts, word.base, -1), -1, larger<int>, shared.ints);
    const int open_before = larger(open, opened.before);
    int closed = 0;
    for_closed(word, starts, before.mark, open_before, p.min_length, [&](int, int) { ++closed; });
    const auto slots = block_scan(closed, 0, plus<int>, shared.ints);
    int slot = count + slots.before;
    for_closed(word, starts, before.mark, open_before, p.min_length,
               [&](int start, int stop) { write_span(span, slot++, start, stop); });
    done = later(done, marks.total);
    open = larger(open, opened.total);
    count += slots.total;
  }
  if (open >= 0 && done.mark + 1 - open >= p.min_length) {
    if (threadIdx.x == 0) write_span(span, count, open, done.mark + 1);
    ++count;
  }
  return count;
}

__device__ __forceinline__ void detect(const DetectSpansParams& p, const Sequence& sequence,
                                       Shared& shared) {
  const Domain domain = read_domain(sequence, shared);
  const Range gap = write_gap(sequence, domain, shared);
  const bool evidence = domain.status == 0 && gap.high - gap.low >= kSmallestGapRange;
  float cut = static_cast<float>(p.threshold);
  if (evidence && p.quantile) {
    const float score = quantile(sequence, gap, domain.tokens, p.threshold, shared);
    cut = fminf(score, static_cast<float>(p.cap));
  }
  const Rule rule{gap, domain.status == 0, evidence ? cut : -1.0f, domain.teacher,
                  static_cast<float>(p.teacher_max)};
  const int64_t index = blockIdx.x;
  int64_t* span = p.span + index * p.max_spans * 2;
  const int count = write_spans(p, sequence, rule, span, shared);
#pragma unroll 1
  for (int64_t i = 2 * int64_t{count} + threadIdx.x; i < 2 * p.max_spans; i += blockDim.x) {
    span[i] = -1;
  }
  if (threadIdx.x == 0) {
    p.count[index] = count;
    p.status[index] = domain.status;
  }
}

__global__ void __launch_bounds__(kMaxThreads) detect_spans_kernel(DetectSpansParams p) {
  const int64_t index = blockIdx.x;
  if (p.sequences == 0) {
    erase(p, 0, p.tokens);
    return;
  }
  const int64_t begin = border(p, index);
  const int64_t stop = larger(border(p, index + 1), begin);
  const int64_t stop_read = smaller(stop, begin + p.max_length);
  if (index == 0) erase(p, 0, begin);
  erase(p, stop_read, index + 1 == p.sequences ? p.tokens : stop);
  detect(p, Sequence(p, begin, stop_read), *dynamic_shared<Shared>());
}

// Eight warps, or more if a thread would have over four tokens: every warp makes barriers slower.
int threads_for(int64_t max_length) {
  const int64_t threads = std::min(max_length, std::max<int64_t>(256, max_length / 4));
  const int64_t warps = (threads + kWarp - 1) / kWarp;
  return static_cast<int>(std::clamp<int64_t>(warps, 1, kMaxWarps)) * kWarp;
}

}  // namespace

int detect_spans(const DetectSpansParams& params, void* stream) {
  if (params.max_length > kMaxLength) return cudaErrorInvalidValue;
  // There may be tokens without a sequence, which one block erases.
  const int64_t blocks = std::max<int64_t>(params.sequences, params.tokens > 0 ? 1 : 0);
  if (blocks == 0) return cudaSuccess;
  return launch(detect_spans_kernel, {blocks, threads_for(params.max_length), sizeof(Shared)},
                stream, params);
}

}  // namespace leaf::cuda
