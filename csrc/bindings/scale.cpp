#include "leaf/scale.h"

#include "check.h"
#include "pages.h"
#include "run.h"

namespace leaf::bindings {
namespace {

void check_factor(const char* op, const Tensor& factor, const Tensor& grad) {
  check_device(op, "factor", factor, grad);
  check_dtype(op, "factor", factor, ScalarType::Float, "float32");
  check(factor.numel() == 1, op, ": factor must have one element, got ", shape_of(factor));
}

void run_op(const char* op, const ScaleParams& params, const Tensor& grad) {
  check(params.width <= INT32_MAX - 64, op, ": grad must have a last dimension below 2^31, got ",
        params.width);
  run(
      op, grad, [&](const Threads& threads) { cpu::scale(params, threads); },
      [&](auto stream) { return cuda::scale(params, stream); });
}

Tensor scaled(Tensor grad, Tensor factor, ScalarType dtype) {
  const DType from_dtype = float_dtype("scaled", "grad", grad);
  check_factor("scaled", factor, grad);
  const Tensor from = torch::stable::contiguous(grad);
  Tensor to = torch::stable::new_empty(grad, grad.sizes(), dtype);
  // View the tensor as a matrix over its last dimension, which is shorter than 2^31.
  const int64_t width = grad.dim() > 0 ? grad.size(grad.dim() - 1) : 1;
  const int64_t rows = width > 0 ? grad.numel() / width : 0;
  if (to.is_cpu()) {
    prefer_huge_pages(to.mutable_data_ptr(), static_cast<size_t>(to.numel() * to.element_size()));
  }
  run_op("scaled",
         {from.const_data_ptr(), from_dtype, width, to.mutable_data_ptr(),
          float_dtype("scaled", "the result", to), width, rows, width, data<const float>(factor)},
         grad);
  return to;
}

void scale_inplace(Tensor grad, Tensor factor) {
  const DType dtype = float_dtype("scale_", "grad", grad);
  check_factor("scale_", factor, grad);
  check(grad.dim() == 2 && (grad.stride(1) == 1 || grad.size(1) <= 1),
        "scale_: grad must be [N, V] with a contiguous last dimension, got ", shape_of(grad));
  run_op("scale_",
         {grad.const_data_ptr(), dtype, grad.stride(0), grad.mutable_data_ptr(), dtype,
          grad.stride(0), grad.size(0), grad.size(1), data<const float>(factor)},
         grad);
}

}  // namespace
}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, {
  m.impl("scaled", TORCH_BOX(&leaf::bindings::scaled));
  m.impl("scale_", TORCH_BOX(&leaf::bindings::scale_inplace));
})
