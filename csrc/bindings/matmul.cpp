#include "leaf/matmul.h"

#include "check.h"
#include "run.h"

namespace leaf::bindings {
namespace {

Bfloat16Matrix matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  check_dtype("bfloat16_matmul", name, tensor, ScalarType::BFloat16, "bfloat16");
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
        "bfloat16_matmul: ", name, " must be [", rows, ", ", columns, "], got ", shape_of(tensor));
  const bool transposed = tensor.stride(1) != 1 && columns > 1;
  check(tensor.stride(transposed ? 0 : 1) == 1 || (transposed ? rows : columns) <= 1,
        "bfloat16_matmul: ", name, " must have contiguous rows or columns");
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.stride(transposed ? 1 : 0),
          transposed};
}

void bfloat16_matmul(Tensor out, Tensor a, Tensor b, bool add) {
  const char* op = "bfloat16_matmul";
  check(cpu::has_amx(), op, ": this machine has no AMX");
  check(out.dim() == 2 && a.dim() == 2 && b.dim() == 2, op, ": the tensors must be matrices");
  const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
  const bool wide = out.scalar_type() == ScalarType::Float;
  check(wide || (out.scalar_type() == ScalarType::BFloat16 && !add), op,
        ": out must be float32, or bfloat16 if nothing is added to it, got ", dtype_name(out));
  check((out.stride(1) == 1 || n <= 1) && (out.stride(0) >= n || m <= 1), op,
        ": out must have contiguous rows that do not overlap");
  cpu::matmul({matrix("a", a, m, k), matrix("b", b, k, n), out.mutable_data_ptr(), out.stride(0),
               wide, add, m, n, k},
              torch_threads());
}

}  // namespace
}  // namespace leaf::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(leaf_ext, m) {
  m.def("bfloat16_matmul(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(leaf_ext, CPU, m) {
  m.impl("bfloat16_matmul", TORCH_BOX(&leaf::bindings::bfloat16_matmul));
}
