#pragma once

// The bindings of the losses over logits share this. `Params` is a loss's parameters.

#include <optional>
#include <tuple>

#include "check.h"
#include "leaf/logits.h"
#include "pages.h"
#include "run.h"

namespace leaf::bindings {

inline Logits logits_view(const char* op, const char* name, const Tensor& tensor, double scale,
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

// The data of a contiguous float32 tensor [N].
inline const float* row_floats(const char* op, const char* name, const Tensor& tensor,
                               int64_t rows) {
  check_dtype(op, name, tensor, ScalarType::Float, "float32");
  check(tensor.dim() == 1 && tensor.size(0) == rows, op, ": ", name, " must be [N] with N = ", rows,
        ", got ", shape_of(tensor));
  check(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got stride ",
        tensor.stride(0));
  return data<const float>(tensor);
}

// Returns the gradient of the student's logits in new memory; empty if it is not needed.
template <class Params>
Tensor new_gradient(const char* op, Params& params, const Tensor& student, bool need_grad) {
  if (!need_grad) return torch::stable::new_empty(student, {0});
  Tensor grad = torch::stable::new_empty(student, student.sizes());
  params.grad = grad.mutable_data_ptr();
  params.grad_dtype = float_dtype(op, "student", student);
  params.grad_row_stride = student.size(1);
  if (student.is_cpu()) {
    prefer_huge_pages(params.grad, static_cast<size_t>(grad.numel() * grad.element_size()));
  }
  return grad;
}

// The dtype of a gradient that overwrites the student's logits. Its rows start where theirs start.
inline DType gradient_dtype(const char* op, const Tensor& student, DType own,
                            std::optional<ScalarType> wanted) {
  if (!wanted || *wanted == student.scalar_type()) return own;
  const bool narrower =
      own == DType::kFloat32 && (*wanted == ScalarType::Half || *wanted == ScalarType::BFloat16);
  check(narrower && on_gpu(student), op,
        ": grad_dtype must be the student's dtype, or for a float32 student on a GPU float16 or "
        "bfloat16, got ",
        dtype_name(*wanted));
  return *wanted == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// Makes the gradient overwrite the student's logits.
template <class Params>
void overwrite_student(const char* op, Params& params, const Tensor& student, bool need_grad,
                       std::optional<ScalarType> wanted) {
  check(student.size(0) <= 1 || student.stride(0) >= student.size(1), op,
        ": rows of student must not overlap, got row stride ", student.stride(0),
        " for V = ", student.size(1));
  if (!need_grad) return;
  params.grad = student.mutable_data_ptr();
  const DType own = float_dtype(op, "student", student);
  params.grad_dtype = gradient_dtype(op, student, own, wanted);
  params.grad_row_stride = student.stride(0) * size_of(own) / size_of(params.grad_dtype);
}

// Allocates loss, grad_scale and rows, and runs the kernel of the device.
template <class Params, class CpuKernel, class GpuKernel>
std::tuple<Tensor, Tensor, Tensor> run_loss(const char* op, Params& params, const Tensor& like,
                                            bool need_rows, const CpuKernel& cpu_kernel,
                                            const GpuKernel& gpu_kernel) {
  Tensor loss = new_tensor(like, {}, ScalarType::Float);
  Tensor grad_scale = new_tensor(like, {}, ScalarType::Float);
  Tensor rows = new_tensor(like, {4, need_rows ? params.rows : 0}, ScalarType::Float);
  params.loss = data<float>(loss);
  params.grad_scale = data<float>(grad_scale);
  params.row_results = need_rows ? data<float>(rows) : nullptr;
  run(op, like, cpu_kernel, gpu_kernel);
  return {loss, grad_scale, rows};
}

}  // namespace leaf::bindings
