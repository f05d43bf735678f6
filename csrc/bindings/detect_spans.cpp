#include "leaf/detect_spans.h"

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "grad_norm.h"

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

// Norms [tokens], from norms as they are or from gradients, whose last dimension is reduced.
Tensor norms(const char* name, const Tensor& tensor, const Tensor& domain) {
  check(same_shape(tensor, domain), kOp, ": ", name,
        " must have the shape of domain, with one more dimension for gradients: ", shape_of(domain),
        ", got ", shape_of(tensor));
  if (tensor.dim() == domain.dim() + 1) return grad_norm_of_rows(rows_of(kOp, name, tensor));
  check(tensor.dim() == domain.dim(), kOp, ": ", name, " must have ", domain.dim(), " or ",
        domain.dim() + 1, " dimensions, got ", tensor.dim());
  check_dtype(kOp, name, tensor, ScalarType::Float, "float32 norms");
  return torch::stable::contiguous(tensor);
}

std::vector<int64_t> batch_offsets(const Tensor& domain, int64_t max_seqlen) {
  check(domain.dim() == 2, kOp, ": domain must be [B, T] without cu_seqlens, got ",
        shape_of(domain));
  check(max_seqlen == domain.size(1), kOp, ": max_seqlen must be T = ", domain.size(1),
        " without cu_seqlens, got ", max_seqlen);
  std::vector<int64_t> offsets(domain.size(0) + 1);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * max_seqlen;
  return offsets;
}

std::vector<int64_t> packed_offsets(const Tensor& cu_seqlens, const Tensor& domain,
                                    int64_t max_seqlen) {
  const bool wide = cu_seqlens.scalar_type() == ScalarType::Long;
  if (!wide) check_dtype(kOp, "cu_seqlens", cu_seqlens, ScalarType::Int, "int64 or int32");
  check(domain.dim() == 1, kOp, ": domain must be [N] with cu_seqlens, got ", shape_of(domain));
  check(cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp,
        ": cu_seqlens must be [B + 1] on the CPU, got ", shape_of(cu_seqlens));
  const Tensor values = torch::stable::contiguous(cu_seqlens);
  std::vector<int64_t> offsets(values.size(0));
  for (size_t i = 0; i < offsets.size(); ++i) {
    offsets[i] = wide ? data<int64_t>(values)[i] : data<int32_t>(values)[i];
    const int64_t length = i == 0 ? 0 : offsets[i] - offsets[i - 1];
    check(offsets[i] >= 0 && offsets[i] <= domain.size(0) && length >= 0 && length <= max_seqlen,
          kOp, ": cu_seqlens must ascend within [0, N = ", domain.size(0),
          "] by at most max_seqlen = ", max_seqlen, ", got ", offsets[i], " at index ", i);
  }
  return offsets;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> detect_spans(
    Tensor teacher, Tensor student, Tensor domain, std::optional<Tensor> prunable, double threshold,
    bool quantile, double cap, double teacher_max, int64_t join_gap, int64_t min_length,
    std::optional<Tensor> cu_seqlens, int64_t max_seqlen) {
  check_dtype(kOp, "domain", domain, ScalarType::Bool, "bool");
  const std::vector<int64_t> offsets = cu_seqlens ? packed_offsets(*cu_seqlens, domain, max_seqlen)
                                                  : batch_offsets(domain, max_seqlen);
  const Tensor teacher_norms = norms("teacher", teacher, domain);
  const Tensor student_norms = norms("student", student, domain);
  const Tensor inside = torch::stable::contiguous(domain);
  std::optional<Tensor> cuttable;
  if (prunable) {
    check_dtype(kOp, "prunable", *prunable, ScalarType::Bool, "bool");
    check(prunable->dim() == domain.dim() && same_shape(*prunable, domain), kOp,
          ": prunable must have the shape of domain, ", shape_of(domain), ", got ",
          shape_of(*prunable));
    cuttable = torch::stable::contiguous(*prunable);
  }

  const auto sequences = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t max_spans = (max_seqlen + 1) / 2;
  Tensor span = new_tensor(domain, {sequences, max_spans, 2}, ScalarType::Long);
  Tensor count = new_tensor(domain, {sequences}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(domain, domain.sizes(), ScalarType::Float);
  Tensor confounder = torch::stable::new_empty(domain, domain.sizes(), ScalarType::Bool);
  Tensor status = new_tensor(domain, {sequences}, ScalarType::Long);

  DetectSpansParams params{};
  params.teacher = data<float>(teacher_norms);
  params.student = data<float>(student_norms);
  params.domain = data<uint8_t>(inside);
  params.prunable = cuttable ? data<uint8_t>(*cuttable) : nullptr;
  params.offsets = offsets.data();
  params.tokens = domain.numel();
  params.sequences = sequences;
  params.max_spans = max_spans;
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
  cpu::detect_spans(params, torch_threads());
  return {span, count, score, confounder, status};
}

}  // namespace
}  // namespace leaf::bindings

STABLE_TORCH_LIBRARY_IMPL(leaf_ext, CPU, m) {
  m.impl("detect_spans", TORCH_BOX(&leaf::bindings::detect_spans));
}
