#include "leaf/topk_kl.h"

#include <optional>
#include <tuple>

#include "check.h"
#include "logits.h"
#include "run.h"

namespace leaf::bindings {
namespace {

void check_listed(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t k) {
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == k && k >= 1 &&
            k <= kMostTopk,
        op, ": ", name, " must be [N, k] with N = ", rows, " and 1 <= k <= ", kMostTopk,
        " like teacher_ids, got ", shape_of(tensor));
  check(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
        tensor.stride(0), " and ", tensor.stride(1));
}

TopkKLParams input_params(const char* op, const Tensor& student, const Tensor& ids,
                          const Tensor& logprobs, const Tensor& tail, const Tensor& row_weight,
                          double temperature, double scale, double softcap) {
  TopkKLParams params{};
  params.student = logits_view(op, "student", student, scale, softcap);
  params.rows = student.size(0);
  params.k = ids.dim() == 2 ? ids.size(1) : 0;
  check_device(op, "teacher_ids", ids, student);
  check_device(op, "teacher_logprobs", logprobs, student);
  check_device(op, "teacher_tail", tail, student);
  check_device(op, "row_weight", row_weight, student);
  check_dtype(op, "teacher_ids", ids, ScalarType::Long, "int64");
  check_dtype(op, "teacher_logprobs", logprobs, ScalarType::Float, "float32");
  check_listed(op, "teacher_ids", ids, params.rows, params.k);
  check_listed(op, "teacher_logprobs", logprobs, params.rows, params.k);
  check(temperature > 0.0, op, ": temperature must be positive, got ", temperature);
  params.ids = data<const int64_t>(ids);
  params.logprobs = data<const float>(logprobs);
  params.tail = row_floats(op, "teacher_tail", tail, params.rows);
  params.row_weight = row_floats(op, "row_weight", row_weight, params.rows);
  params.temperature = static_cast<float>(temperature);
  return params;
}

std::tuple<Tensor, Tensor, Tensor> run_op(const char* op, TopkKLParams& params, const Tensor& like,
                                          bool need_rows) {
  return run_loss(
      op, params, like, need_rows, [&](const Threads& threads) { cpu::topk_kl(params, threads); },
      [&](auto stream) {
        const Tensor scratch = new_tensor(like, {cuda::topk_kl_scratch(params)}, ScalarType::Float);
        return cuda::topk_kl(params, data<float>(scratch), stream);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_kl(Tensor student, Tensor ids, Tensor logprobs,
                                                   Tensor tail, Tensor row_weight,
                                                   double temperature, double scale, double softcap,
                                                   bool need_grad, bool need_rows) {
  TopkKLParams params = input_params("topk_kl", student, ids, logprobs, tail, row_weight,
                                     temperature, scale, softcap);
  Tensor grad = new_gradient("topk_kl", params, student, need_grad);
  auto [loss, grad_scale, rows] = run_op("topk_kl", params, student, need_rows);
  return {loss, grad, grad_scale, rows};
}

std::tuple<Tensor, Tensor, Tensor> topk_kl_inplace(Tensor student, Tensor ids, Tensor logprobs,
                                                   Tensor tail, Tensor row_weight,
                                                   double temperature, double scale, double softcap,
                                                   bool need_grad, bool need_rows,
                                                   std::optional<ScalarType> grad_dtype) {
  TopkKLParams params = input_params("topk_kl_", student, ids, logprobs, tail, row_weight,
                                     temperature, scale, softcap);
  overwrite_student("topk_kl_", params, student, need_grad, grad_dtype);
  return run_op("topk_kl_", params, student, need_rows);
}

}  // namespace
}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, {
  m.impl("topk_kl", TORCH_BOX(&leaf::bindings::topk_kl));
  m.impl("topk_kl_", TORCH_BOX(&leaf::bindings::topk_kl_inplace));
})
