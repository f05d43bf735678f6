// loss = T^2 sum_i w_i KL(p_t, p_s) over the common vocabulary, and its gradient. Per row, with y
// the scaled, capped logit, m its maximum, d = sum_v exp((y - m) / T) and p = exp((y - m) / T) / d:
//
//     l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
//     KL   = sum_v p_s - p_t + p_t l
//     grad = w T (p_s - p_t) dy_s/dz_s
//
// Where l is small, p_s - p_t = p_t (phi - l) and the term of the sum is p_t phi, with
// phi = exp(-l) - 1 + l >= 0 by its series, so that nothing cancels. The maxima are subtracted
// first, so that an offset between the two models costs no digits.
//
// A cluster of thread blocks holds a row pair in its shared memory, a slice in each block: a logit
// is read from memory once, and threads read back only what they copied themselves. The blocks
// exchange maxima and sums once, in a fixed order; what they sum up afterwards they leave in
// scratch memory, and a second, small launch adds it. Where no cluster can hold a row, one block
// streams it twice.

#include "leaf/dual_kl.h"

#include <algorithm>

#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "leaf/cuda.h"
#include "logits.cuh"
#include "softmax.cuh"

namespace leaf::cuda {
namespace {

constexpr int kMaxCluster = 16;      // from compute capability 9.0 on
constexpr int kPortableCluster = 8;  // each of these GPUs can run so many blocks as a cluster
constexpr int kHeldThreads = 256;
constexpr int kStreamedThreads = 512;
constexpr int kRowWarps = kStreamedThreads / kWarp;  // at most
constexpr int kFinishThreads = 1024;
// Blocks that share a multiprocessor, so that one computes while another one waits for memory. With
// measures the registers suffice for two.
constexpr int kBlocksPerMultiprocessor = 3;

// What is summed over a row once its softmax is known.
struct Sums {
  float kl = 0.0f;
  float student_entropy = 0.0f;
  float teacher_entropy = 0.0f;
};

struct Scratch {
  float* sums;  // [3 with measures, else 1, rows, cluster]
  int cluster;
};

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

template <bool kMeasures>
struct alignas(16) Shared {
  Part<kMeasures> warps[kRowWarps];
  Part<kMeasures> blocks[kMaxCluster];
  Sums sums[kRowWarps];
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.kl + b.kl, a.student_entropy + b.student_entropy,
          a.teacher_entropy + b.teacher_entropy};
}

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

// All blocks of a cluster learn what all of them know, merged in the order of their ranks. The
// first wait belongs to cluster_announce in rows_kernel: shared memory of a block must not be
// written to before the block runs.
template <class Shared, class Part, class Merge>
__device__ __forceinline__ Part exchange(Shared& shared, const Part& mine, const Merge& merge) {
  const int size = cluster_size();
  cluster_wait();
  if (static_cast<int>(threadIdx.x) < size) {
    *in_block(&shared.blocks[cluster_rank()], static_cast<int>(threadIdx.x)) = mine;
  }
  cluster_arrive();
  cluster_wait();
  const int lane = lane_index();
  return warp_reduce(shared.blocks[lane < size ? lane : 0], merge, size);
}

template <bool kMeasures>
__device__ __forceinline__ void store_sums(const Sums& sums, const Scratch& scratch, int64_t rows,
                                           int64_t row, int rank) {
  float* to = scratch.sums + row * scratch.cluster + rank;
  const int64_t step = rows * scratch.cluster;
  to[0] = sums.kl;
  if constexpr (kMeasures) {
    to[step] = sums.student_entropy;
    to[2 * step] = sums.teacher_entropy;
  }
}

template <class E, bool kHeld, bool kMeasures>
__global__ void __launch_bounds__(kHeld ? kHeldThreads : kStreamedThreads,
                                  kHeld && !kMeasures ? kBlocksPerMultiprocessor : 2)
    rows_kernel(const DualKLParams params, const Scratch scratch, const int64_t held_groups) {
  const int size = kHeld ? cluster_size() : 1;
  const int rank = kHeld ? cluster_rank() : 0;
  const int64_t index = blockIdx.x / size;
  const float weight = params.row_weight[index];
  if (weight == 0.0f) {
    if (threadIdx.x == 0) {
      store_sums<kMeasures>(Sums{}, scratch, params.rows, index, rank);
      if (kMeasures && rank == 0) params.row_results[3 * params.rows + index] = 0.0f;
    }
    if (params.grad == nullptr) return;
    const int64_t bytes = size_of(params.grad_dtype);
    zero_bytes(static_cast<char*>(params.grad) + index * params.grad_row_stride * bytes,
               params.student.vocab * bytes, rank * blockDim.x + threadIdx.x, size * blockDim.x);
    return;
  }
  if (size > 1) cluster_announce();

  auto& shared = *dynamic_shared<Shared<kMeasures>>();
  Row<E, kHeld, kMeasures> row(params, index, held_groups, reinterpret_cast<char*>(&shared + 1));
  const auto merge = [&](const auto& a, const auto& b) { return row.merged(a, b); };
  if constexpr (kHeld) row.copy();
  Part<kMeasures> part = block_reduce(row.part(), merge, shared.warps);
  if (size > 1) part = exchange(shared, part, merge);

  float factor = weight * params.temperature * params.student.scale;
  if (params.grad_dtype == DType::kFloat16) factor *= *params.grad_scale;
  const auto add = [](const Sums& a, const Sums& b) { return a + b; };
  const Sums sums = block_reduce(row.terms(part, factor), add, shared.sums);
  row.zero_rest();
  if (threadIdx.x != 0) return;
  store_sums<kMeasures>(sums, scratch, params.rows, index, rank);
  if constexpr (kMeasures) {
    const bool agree = part.student_top.place() == part.teacher_top.place();
    if (rank == 0) params.row_results[3 * params.rows + index] = agree ? 1.0f : 0.0f;
  }
}

// The power of two that brings the largest possible entry of a float16 gradient, |p_s - p_t| being
// at most 1, into (2^14, 2^15]: below its overflow, and as far from its underflow as can be.
__global__ void __launch_bounds__(kFinishThreads)
    scale_kernel(const float* row_weight, int64_t rows, float bound, float* grad_scale) {
  __shared__ float warps[kMaxWarps];
  float most = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) most = fmaxf(most, fabsf(row_weight[i]));
  most = block_reduce(most, [](float a, float b) { return fmaxf(a, b); }, warps) * bound;
  if (threadIdx.x != 0) return;
  const int bits = __float_as_int(most);
  const int ceiling = (bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);  // of log2(most)
  const int exponent = min(max(15 - ceiling, -126), 126);
  const bool sound = most > 0.0f && most < INFINITY;
  *grad_scale = sound ? __int_as_float((exponent + 127) << 23) : 1.0f;
}

// Sums up what the blocks left of each row, and the rows: in float64, in a fixed order.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const DualKLParams params, const Scratch scratch, bool measures) {
  __shared__ double warps[kMaxWarps];
  double loss = 0.0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    const double weight = params.row_weight[row];
    for (int quantity = 0; quantity < (measures ? 3 : 1); ++quantity) {
      const float* parts = scratch.sums + (quantity * params.rows + row) * scratch.cluster;
      double total = 0.0;  // of a dropped row 0
      for (int i = 0; i < scratch.cluster; ++i) total += parts[i];
      if (quantity == 0) loss += weight * total;
      if (measures) params.row_results[quantity * params.rows + row] = static_cast<float>(total);
    }
    if (measures) {
      float* agreement = params.row_results + 3 * params.rows + row;
      const float kl = params.row_results[row];
      if (isnan(kl)) *agreement = kl;
    }
  }
  loss = block_reduce(loss, [](double a, double b) { return a + b; }, warps);
  if (threadIdx.x != 0) return;
  const double temperature = params.temperature;
  *params.loss = static_cast<float>(loss * temperature * temperature);
  if (params.grad == nullptr || params.grad_dtype != DType::kFloat16) *params.grad_scale = 1.0f;
}

// How a row is laid out on the device.
struct Plan {
  bool held;
  int cluster;
  int64_t groups;  // of a block
  size_t shared_bytes;

  Launch launch(int64_t rows) const {
    return {rows * cluster, held ? kHeldThreads : kStreamedThreads, shared_bytes, cluster};
  }
};

int attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

template <bool kMeasures>
Plan held_by(const DualKLParams& params, int cluster) {
  const int64_t pad = 16 / size_of(params.student.dtype) - 1;
  const int64_t groups = (common_vocab(params) + pad + kGroup - 1) / kGroup;
  const int64_t share = (groups + cluster - 1) / cluster;
  const int64_t bytes = kGroup * (size_of(params.student.dtype) + size_of(params.teacher.dtype));
  return {true, cluster, share, sizeof(Shared<kMeasures>) + static_cast<size_t>(share * bytes)};
}

// The smallest cluster with room for three blocks on a multiprocessor; else the largest one with
// room for two; else one block that streams the row.
template <bool kMeasures>
Plan make_plan(const DualKLParams& params, int largest_cluster) {
  constexpr size_t kReserved = 1024;  // of each block, by the system
  const auto most = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const auto whole = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const size_t roomy = whole / kBlocksPerMultiprocessor - kReserved;
  Plan best{false, 1, 0, sizeof(Shared<kMeasures>)};
  for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
    const Plan plan = held_by<kMeasures>(params, cluster);
    // Where a multiprocessor had room for one block alone, nothing would hide its waiting.
    if (plan.shared_bytes > std::min(most, whole / 2 - kReserved)) continue;
    best = plan;
    if (plan.shared_bytes <= roomy) break;
  }
  return best;
}

// The kernel with the shared memory and the cluster size of its plan.
template <class E, bool kHeld, bool kMeasures>
cudaError_t permit(const Plan& plan) {
  const auto kernel = rows_kernel<E, kHeld, kMeasures>;
  // The same in all calls: another thread may launch the kernel between this and our launch.
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && kHeld) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && plan.cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return reported(error);
}

template <class E, bool kHeld, bool kMeasures>
cudaError_t launch_rows(const DualKLParams& params, const Plan& plan, float* sums, void* stream) {
  const cudaError_t error = permit<E, kHeld, kMeasures>(plan);
  if (error != cudaSuccess) return error;
  return launch(rows_kernel<E, kHeld, kMeasures>, plan.launch(params.rows), stream, params,
                Scratch{sums, plan.cluster}, plan.groups);
}

template <class E, bool kMeasures>
Plan plan_for(const DualKLParams& params) {
  // Of the code that runs: a newer GPU may run what was compiled for an older one.
  cudaFuncAttributes compiled{};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, rows_kernel<E, true, kMeasures>);
  const bool clusters = reported(error) == cudaSuccess && compiled.ptxVersion >= 90;
  const Plan plan = make_plan<kMeasures>(params, clusters ? kMaxCluster : 1);
  if (plan.cluster <= kPortableCluster) return plan;
  const bool runs = permit<E, true, kMeasures>(plan) == cudaSuccess &&
                    fits(rows_kernel<E, true, kMeasures>, plan.launch(params.rows));
  return runs ? plan : make_plan<kMeasures>(params, kPortableCluster);
}

template <bool kMeasures>
cudaError_t run(const DualKLParams& params, float* scratch, void* stream) {
  const Launch alone{1, kFinishThreads};
  cudaError_t error = cudaSuccess;
  if (params.grad != nullptr && params.grad_dtype == DType::kFloat16) {
    error = launch(scale_kernel, alone, stream, params.row_weight, params.rows,
                   params.temperature * params.student.scale, params.grad_scale);
    if (error != cudaSuccess) return error;
  }
  int cluster = 1;
  if (params.rows > 0) {
    const auto start = [&](auto element) {
      using E = decltype(element);
      const Plan plan = plan_for<E, kMeasures>(params);
      cluster = plan.cluster;
      return plan.held ? launch_rows<E, true, kMeasures>(params, plan, scratch, stream)
                       : launch_rows<E, false, kMeasures>(params, plan, scratch, stream);
    };
    error = params.student.dtype == params.teacher.dtype ? with_element(params.student.dtype, start)
                                                         : start(AnyElement{});
    if (error != cudaSuccess) return error;
  }
  return launch(finish_kernel, alone, stream, params, Scratch{scratch, cluster}, kMeasures);
}

}  // namespace

int64_t dual_kl_scratch(const DualKLParams& params) {
  return params.rows * kMaxCluster * (params.row_results != nullptr ? 3 : 1);
}

int dual_kl(const DualKLParams& params, float* scratch, void* stream) {
  return params.row_results != nullptr ? run<true>(params, scratch, stream)
                                       : run<false>(params, scratch, stream);
}

}  // namespace leaf::cuda
