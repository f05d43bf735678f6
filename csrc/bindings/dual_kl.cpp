#include "leaf/dual_kl.h"

#include <optional>
#include <tuple>

#include "check.h"
#include "pages.h"
#include "run.h"

namespace leaf::bindings {
namespace {

Logits logits_view(const char* op, const char* name, const Tensor& tensor, double scale,
                   double softcap) {
  const DType dtype = float_dtype(op, name, tensor);
  check(tensor.dim() == 2 && tensor.size(1) >= 1, op, ": ", name,
        " must be [N, V] with V >= 1, got ", shape_of(tensor));
  check(tensor.stride(1) == 1 || tensor.size(1) == 1, op, ": ", name,
        " must have a contiguous last dimension, got stride ", tensor.stride(1));
  check(tensor.size(1) <= INT32_MAX - 64, op, ": ", name, " must have V below 2^31, got ",
        tensor.size(1));
  return {tensor.const_data_ptr(),   dtype,
          tensor.stride(0),          tensor.size(1),
          static_cast<float>(scale), static_cast<float>(softcap)};
}

// The GPU kernels take logits of one dtype. Mixed dtypes are copied to float32, which is exact.
Tensor as_the_other(const Tensor& logits, const Tensor& other) {
  if (!on_gpu(logits) || logits.scalar_type() == other.scalar_type()) return logits;
  return torch::stable::to(logits, ScalarType::Float);
}

DualKLParams input_params(const char* op, const Tensor& student, const Tensor& teacher,
                          const Tensor& row_weight, double temperature, double student_scale,
                          double teacher_scale, double student_softcap, double teacher_softcap) {
  DualKLParams params{};
  params.student = logits_view(op, "student", student, student_scale, student_softcap);
  params.teacher = logits_view(op, "teacher", teacher, teacher_scale, teacher_softcap);
  params.rows = student.size(0);
  check(teacher.size(0) == params.rows, op, ": teacher must have the student's ", params.rows,
        " rows, got ", teacher.size(0));
  check_device(op, "teacher", teacher, student);
  check_device(op, "row_weight", row_weight, student);
  check_dtype(op, "row_weight", row_weight, ScalarType::Float, "float32");
  check(row_weight.dim() == 1 && row_weight.size(0) == params.rows, op,
        ": row_weight must be [N] with N = ", params.rows, ", got ", shape_of(row_weight));
  check(row_weight.is_contiguous(), op, ": row_weight must be contiguous, got stride ",
        row_weight.stride(0));
  check(temperature > 0.0, op, ": temperature must be positive, got ", temperature);
  params.row_weight = data<const float>(row_weight);
  params.temperature = static_cast<float>(temperature);
  return params;
}

// Allocates loss, grad_scale and rows, and runs the kernel.
std::tuple<Tensor, Tensor, Tensor> run_op(const char* op, DualKLParams& params, const Tensor& like,
                                          bool need_rows) {
  Tensor loss = new_tensor(like, {}, ScalarType::Float);
  Tensor grad_scale = new_tensor(like, {}, ScalarType::Float);
  Tensor rows = new_tensor(like, {4, need_rows ? params.rows : 0}, ScalarType::Float);
  params.loss = data<float>(loss);
  params.grad_scale = data<float>(grad_scale);
  params.row_results = need_rows ? data<float>(rows) : nullptr;
  run(
      op, like, [&](const Threads& threads) { cpu::dual_kl(params, threads); },
      [&](auto stream) {
        const Tensor scratch = new_tensor(like, {cuda::dual_kl_scratch(params)}, ScalarType::Float);
        return cuda::dual_kl(params, data<float>(scratch), stream);
      });
  return {loss, grad_scale, rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_kl(Tensor student, Tensor teacher,
                                                   Tensor row_weight, double temperature,
                                                   double student_scale, double teacher_scale,
                                                   double student_softcap, double teacher_softcap,
                                                   bool need_grad, bool need_rows) {
  const Tensor logits = as_the_other(student, teacher);
  const Tensor teacher_logits = as_the_other(teacher, student);
  DualKLParams params =
      input_params("dual_kl", logits, teacher_logits, row_weight, temperature, student_scale,
                   teacher_scale, student_softcap, teacher_softcap);
  Tensor grad = need_grad ? torch::stable::new_empty(student, student.sizes())
                          : torch::stable::new_empty(student, {0});
  if (need_grad) {
    params.grad = grad.mutable_data_ptr();
    params.grad_dtype = float_dtype("dual_kl", "student", student);
    params.grad_row_stride = student.size(1);
    if (student.is_cpu()) {
      prefer_huge_pages(params.grad, static_cast<size_t>(grad.numel() * grad.element_size()));
    }
  }
  auto [loss, grad_scale, rows] = run_op("dual_kl", params, student, need_rows);
  return {loss, grad, grad_scale, rows};
}

// The dtype of a gradient that overwrites the student's logits. Its rows start where theirs start.
DType gradient_dtype(const Tensor& student, DType own, std::optional<ScalarType> wanted) {
  if (!wanted || *wanted == student.scalar_type()) return own;
  const bool narrower =
      own == DType::kFloat32 && (*wanted == ScalarType::Half || *wanted == ScalarType::BFloat16);
  check(narrower && on_gpu(student),
        "dual_kl_: grad_dtype must be the student's dtype, or for a "
        "float32 student on a GPU float16 or bfloat16, got ",
        dtype_name(*wanted));
  return *wanted == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

std::tuple<Tensor, Tensor, Tensor> dual_kl_inplace(Tensor student, Tensor teacher,
                                                   Tensor row_weight, double temperature,
                                                   double student_scale, double teacher_scale,
                                                   double student_softcap, double teacher_softcap,
                                                   bool need_grad, bool need_rows,
                                                   std::optional<ScalarType> grad_dtype) {
  const Tensor logits = as_the_other(student, teacher);
  const Tensor teacher_logits = as_the_other(teacher, student);
  DualKLParams params =
      input_params("dual_kl_", logits, teacher_logits, row_weight, temperature, student_scale,
                   teacher_scale, student_softcap, teacher_softcap);
  check(student.size(0) <= 1 || student.stride(0) >= student.size(1), "dual_kl_",
        ": rows of student must not overlap, got row stride ", student.stride(0),
        " for V = ", student.size(1));
  if (need_grad) {
    params.grad = student.mutable_data_ptr();
    const DType own = float_dtype("dual_kl_", "student", student);
    params.grad_dtype = gradient_dtype(student, own, grad_dtype);
    params.grad_row_stride = student.stride(0) * size_of(own) / size_of(params.grad_dtype);
  }
  return run_op("dual_kl_", params, student, need_rows);
}

}  // namespace
}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, {
  m.impl("dual_kl", TORCH_BOX(&leaf::bindings::dual_kl));
  m.impl("dual_kl_", TORCH_BOX(&leaf::bindings::dual_kl_inplace));
})
