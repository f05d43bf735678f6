#include "leaf/dual_kl.h"

#include <optional>
#include <tuple>

#include "check.h"
#include "logits.h"
#include "pages.h"
#include "run.h"

namespace leaf::bindings {
namespace {

// The GPU kernels take logits of one dtype. Mixed dtypes are copied to float32, which is exact.
Tensor as_the_other(const Tensor& logits, const Tensor& other) {
  if (!on_gpu(logits) || logits.scalar_type() == other.scalar_type()) return logits;
  return torch::stable::to(logits, ScalarType::Float);
}

DualKLParams input_params(const char* op, const Tensor& student, const Tensor& teacher,
                          const Tensor& row_weight, double temperature, double student_scale,
                          double teacher_scale, double student_softcap, double teacher_softcap,
                          double beta) {
  DualKLParams params{};
  params.student = logits_view(op, "student", student, student_scale, student_softcap);
  params.teacher = logits_view(op, "teacher", teacher, teacher_scale, teacher_softcap);
  params.rows = student.size(0);
  check(teacher.size(0) == params.rows, op, ": teacher must have the student's ", params.rows,
        " rows, got ", teacher.size(0));
  check_device(op, "teacher", teacher, student);
  check_device(op, "row_weight", row_weight, student);
  params.row_weight = row_floats(op, "row_weight", row_weight, params.rows);
  check(temperature > 0.0, op, ": temperature must be positive, got ", temperature);
  params.temperature = static_cast<float>(temperature);
  check(beta >= 0.0 && beta <= 1.0, op, ": beta must be in [0, 1], got ", beta);
  params.beta = static_cast<float>(beta);
  params.rest = static_cast<float>(1.0 - beta);
  params.slope_bound = beta == 1.0 ? 256.0f : 1.0f;  // as in slope_bound of schema.py
  return params;
}

std::tuple<Tensor, Tensor, Tensor> run_op(const char* op, DualKLParams& params, const Tensor& like,
                                          bool need_rows) {
  return run_loss(
      op, params, like, need_rows, [&](const Threads& threads) { cpu::dual_kl(params, threads); },
      [&](auto stream) {
        const Tensor scratch = new_tensor(like, {cuda::dual_kl_scratch(params)}, ScalarType::Float);
        return cuda::dual_kl(params, data<float>(scratch), stream);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_kl(Tensor student, Tensor teacher,
                                                   Tensor row_weight, double temperature,
                                                   double student_scale, double teacher_scale,
                                                   double student_softcap, double teacher_softcap,
                                                   double beta, bool need_grad, bool need_rows) {
  const Tensor logits = as_the_other(student, teacher);
  const Tensor teacher_logits = as_the_other(teacher, student);
  DualKLParams params =
      input_params("dual_kl", logits, teacher_logits, row_weight, temperature, student_scale,
                   teacher_scale, student_softcap, teacher_softcap, beta);
  Tensor grad = new_gradient("dual_kl", params, student, need_grad);
  auto [loss, grad_scale, rows] = run_op("dual_kl", params, student, need_rows);
  return {loss, grad, grad_scale, rows};
}

std::tuple<Tensor, Tensor, Tensor> dual_kl_inplace(Tensor student, Tensor teacher,
                                                   Tensor row_weight, double temperature,
                                                   double student_scale, double teacher_scale,
                                                   double student_softcap, double teacher_softcap,
                                                   double beta, bool need_grad, bool need_rows,
                                                   std::optional<ScalarType> grad_dtype) {
  const Tensor logits = as_the_other(student, teacher);
  const Tensor teacher_logits = as_the_other(teacher, student);
  DualKLParams params =
      input_params("dual_kl_", logits, teacher_logits, row_weight, temperature, student_scale,
                   teacher_scale, student_softcap, teacher_softcap, beta);
  overwrite_student("dual_kl_", params, student, need_grad, grad_dtype);
  return run_op("dual_kl_", params, student, need_rows);
}

}  // namespace
}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, {
  m.impl("dual_kl", TORCH_BOX(&leaf::bindings::dual_kl));
  m.impl("dual_kl_", TORCH_BOX(&leaf::bindings::dual_kl_inplace));
})
