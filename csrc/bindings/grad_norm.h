#pragma once

#include <utility>

#include "check.h"
#include "leaf/grad_norm.h"

namespace leaf::bindings {

// The rows of `tensor` (its last dimension), and the tensor that holds them: `tensor` itself
// wherever two strides can describe it, else a contiguous copy.
struct Rows {
  Tensor owner;
  RowsView view;
};

Rows rows_of(const char* op, const char* name, const Tensor& tensor);

// [rows] float32
Tensor grad_norm_of_rows(const Rows& rows);

// Both models', on a GPU in one launch.
std::pair<Tensor, Tensor> grad_norms_of_rows(const Rows& first, const Rows& second);

}  // namespace leaf::bindings
