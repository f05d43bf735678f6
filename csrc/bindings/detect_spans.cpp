#include "leaf/detect_spans.h"

#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "grad_norm.h"
#include "run.h"

namespace leaf::bindings {
namespace {

constexpr const char* kOp = "detect_spans";

bool same_shape(const Tensor& tensor, const Tensor& domain) {
  if (tensor.dim() < domain.dim()) return false;
  for (int64_t i = 0; i < domain.dim(); ++i) {
    if (tensor.size(i) != domain.size(i)) return false;
  }
  return true;
}

bool is_gradient(const char* name, const Tensor& tensor, const Tensor& domain) {
  check_device(kOp, name, tensor, domain);
  check(same_shape(tensor, domain), kOp, ": ", name,
        " must have the shape of domain, with one more dimension for gradients: ", shape_of(domain),
        ", got ", shape_of(tensor));
  if (tensor.dim() == domain.dim() + 1) return true;
  check(tensor.dim() == domain.dim(), kOp, ": ", name, " must have ", domain.dim(), " or ",
        domain.dim() + 1, " dimensions, got ", tensor.dim());
  check_dtype(kOp, name, tensor, ScalarType::Float, "float32 norms");
  return false;
}

// The norms of teacher and student, [tokens] each. Gradients are reduced to norms first.
std::pair<Tensor, Tensor> norms_of(const Tensor& teacher, const Tensor& student,
                                   const Tensor& domain) {
  const bool gradients = is_gradient("teacher", teacher, domain);
  check(is_gradient("student", student, domain) == gradients, kOp,
        ": student must hold norms or gradients as teacher does, got ", shape_of(student));
  if (!gradients) {
    return {torch::stable::contiguous(teacher), torch::stable::contiguous(student)};
  }
  return grad_norms_of_rows(rows_of(kOp, "teacher", teacher), rows_of(kOp, "student", student));
}

void check_padded(const Tensor& domain, int64_t max_seqlen) {
  check(domain.dim() == 2, kOp, ": domain must be [B, T] without cu_seqlens, got ",
        shape_of(domain));
  check(max_seqlen == domain.size(1), kOp, ": max_seqlen must be T = ", domain.size(1),
        " without cu_seqlens, got ", max_seqlen);
}

// The borders as int64, contiguous.
Tensor packed_borders(const Tensor& cu_seqlens, const Tensor& domain) {
  check(domain.dim() == 1, kOp, ": domain must be [N] with cu_seqlens, got ", shape_of(domain));
  check_device(kOp, "cu_seqlens", cu_seqlens, domain);
  check_dtype(kOp, "cu_seqlens", cu_seqlens, ScalarType::Long, "int64");
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp, ": cu_seqlens must be [B + 1], got ",
        shape_of(cu_seqlens));
  return torch::stable::contiguous(cu_seqlens);
}

// A wrong border is an error on a CPU. On a GPU the kernel clamps its reads to the tensors instead.
void check_borders(const int64_t* borders, int64_t sequences, int64_t tokens, int64_t max_seqlen) {
  for (int64_t i = 0; i <= sequences; ++i) {
    const int64_t length = i == 0 ? 0 : borders[i] - borders[i - 1];
    check(borders[i] >= 0 && borders[i] <= tokens && length >= 0 && length <= max_seqlen, kOp,
          ": cu_seqlens must ascend within [0, N = ", tokens,
          "] by at most max_seqlen = ", max_seqlen, ", got ", borders[i], " at index ", i);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> detect_spans(
    Tensor teacher, Tensor student, Tensor domain, std::optional<Tensor> prunable, bool log_scale,
    double student_weight, double threshold, bool quantile, double cap, double teacher_max,
    int64_t join_gap, int64_t min_length, std::optional<Tensor> cu_seqlens, int64_t max_seqlen) {
  check_dtype(kOp, "domain", domain, ScalarType::Bool, "bool");
  std::optional<Tensor> borders;
  if (cu_seqlens) {
    borders = packed_borders(*cu_seqlens, domain);
  } else {
    check_padded(domain, max_seqlen);
  }
  const auto [teacher_norms, student_norms] = norms_of(teacher, student, domain);
  const Tensor inside = torch::stable::contiguous(domain);
  std::optional<Tensor> cuttable;
  if (prunable) {
    check_device(kOp, "prunable", *prunable, domain);
    check_dtype(kOp, "prunable", *prunable, ScalarType::Bool, "bool");
    check(prunable->dim() == domain.dim() && same_shape(*prunable, domain), kOp,
          ": prunable must have the shape of domain, ", shape_of(domain), ", got ",
          shape_of(*prunable));
    cuttable = torch::stable::contiguous(*prunable);
  }

  const int64_t sequences = borders ? borders->size(0) - 1 : domain.size(0);
  const int64_t max_spans = (max_seqlen + 1) / 2;
  Tensor span = new_tensor(domain, {sequences, max_spans, 2}, ScalarType::Long);
  Tensor count = new_tensor(domain, {sequences}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(domain, domain.sizes(), ScalarType::Float);
  Tensor confounder = torch::stable::new_empty(domain, domain.sizes(), ScalarType::Bool);
  Tensor status = new_tensor(domain, {sequences}, ScalarType::Long);

  DetectSpansParams params{};
  params.teacher = data<const float>(teacher_norms);
  params.student = data<const float>(student_norms);
  params.domain = data<const uint8_t>(inside);
  params.prunable = cuttable ? data<const uint8_t>(*cuttable) : nullptr;
  params.offsets = borders ? data<const int64_t>(*borders) : nullptr;
  params.tokens = domain.numel();
  params.sequences = sequences;
  params.max_length = max_seqlen;
  params.max_spans = max_spans;
  params.set_scale(log_scale, student_weight);
  params.threshold = threshold;
  params.quantile = quantile;
  params.cap = cap;
  params.teacher_max = teacher_max;
  params.join_gap = join_gap;
  params.min_length = min_length;
  params.span = data<int64_t>(span);
  params.count = data<int64_t>(count);
  params.score = data<float>(score);
  params.confounder = data<uint8_t>(confounder);
  params.status = data<int64_t>(status);
  run(
      kOp, domain,
      [&](const Threads& threads) {
        if (borders) check_borders(params.offsets, sequences, params.tokens, max_seqlen);
        cpu::detect_spans(params, threads);
      },
      [&](auto stream) { return cuda::detect_spans(params, stream); });
  return {span, count, score, confounder, status};
}

}  // namespace
}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, { m.impl("detect_spans", TORCH_BOX(&leaf::bindings::detect_spans)); })
