#include "grad_norm.h"

#include "run.h"

namespace leaf::bindings {
namespace {

// Returns whether dimensions 0 to dim - 3 can be viewed as one, with the stride of the last of
// them.
bool outer_dimensions_collapse(const Tensor& tensor) {
  for (int64_t i = 0; i + 3 < tensor.dim(); ++i) {
    if (tensor.stride(i) != tensor.stride(i + 1) * tensor.size(i + 1)) return false;
  }
  return true;
}

Tensor grad_norm(Tensor grad) {
  const Rows rows = rows_of("grad_norm", "grad", grad);
  const Tensor norm = grad_norm_of_rows(rows);
  const auto sizes = grad.sizes();
  return torch::stable::view(norm, {sizes.data(), sizes.size() - 1});
}

}  // namespace

Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  const DType dtype = float_dtype(op, name, tensor);
  const int64_t dim = tensor.dim();
  check(dim >= 1, op, ": ", name, " must have at least one dimension, got a scalar");
  const int64_t width = tensor.size(dim - 1);
  const bool as_it_is =
      (tensor.stride(dim - 1) == 1 || width <= 1) && outer_dimensions_collapse(tensor);
  const Tensor owner = as_it_is ? tensor : torch::stable::contiguous(tensor);

  RowsView view{owner.const_data_ptr(), dtype, 1, 1, 0, 0, width};
  for (int64_t i = 0; i + 1 < dim; ++i) view.rows *= owner.size(i);
  if (!as_it_is) {
    // The strides are not used: a contiguous tensor may have any along dimensions of size 1.
    view.inner = view.rows;
    view.inner_stride = width;
    return {owner, view};
  }
  if (dim >= 2) {
    view.inner = owner.size(dim - 2);
    view.inner_stride = owner.stride(dim - 2);
  }
  if (dim >= 3) view.outer_stride = owner.stride(dim - 3);
  return {owner, view};
}

namespace {

GradNormParams params_of(const Rows& rows, const Tensor& norm) {
  return {rows.view, data<float>(norm)};
}

Tensor new_norm(const Rows& rows) {
  return new_tensor(rows.owner, {rows.view.rows}, ScalarType::Float);
}

}  // namespace

Tensor grad_norm_of_rows(const Rows& rows) {
  const Tensor norm = new_norm(rows);
  const GradNormParams params = params_of(rows, norm);
  run(
      "grad_norm", rows.owner, [&](const Threads& threads) { cpu::grad_norm(params, threads); },
      [&](auto stream) { return cuda::grad_norm(params, nullptr, stream); });
  return norm;
}

std::pair<Tensor, Tensor> grad_norms_of_rows(const Rows& first, const Rows& second) {
  const std::pair<Tensor, Tensor> norms{new_norm(first), new_norm(second)};
  const GradNormParams one = params_of(first, norms.first);
  const GradNormParams other = params_of(second, norms.second);
  run(
      "detect_spans", first.owner,
      [&](const Threads& threads) {
        cpu::grad_norm(one, threads);
        cpu::grad_norm(other, threads);
      },
      [&](auto stream) { return cuda::grad_norm(one, &other, stream); });
  return norms;
}

}  // namespace leaf::bindings

LEAF_IMPLEMENT(m, { m.impl("grad_norm", TORCH_BOX(&leaf::bindings::grad_norm)); })
