#pragma once

#include <utility>

#include "check.h"
#include "leaf/grad_norm.h"

namespace leaf::bindings {

// The rows of `tensor` (its last dimension) and the tensor that owns their memory: `tensor` itself
// if two strides describe it, otherwise a contiguous copy.
struct Rows {
  Tensor owner;
  RowsView view;
};

Rows rows_of(const char* op, const char* name, const Tensor& tensor);

// The norm of each row, [rows] float32.
Tensor grad_norm_of_rows(const Rows& rows);

// The norms of both models, in one launch on a GPU.
std::pair<Tensor, Tensor> grad_norms_of_rows(const Rows& first, const Rows& second);

}  // namespace leaf::bindings
