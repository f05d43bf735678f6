// driver [OP ...]: compares the CUDA kernels of these ops, or of all, with the CPU's.

#include "driver.h"

#include "leaf/grad_norm.h"
#include "leaf/scale.h"

namespace leaf::driver {

namespace {

// Rows [outer, inner] with gaps between them. Some values are so large, small or special that the
// plain sum of squares is wrong.
void compare_norms(DType dtype, int64_t outer, int64_t inner, int64_t width, int64_t gap,
                   int64_t shift) {
  const std::string which = std::string("grad_norm ") + name_of(dtype) + " [" +
                            std::to_string(outer) + ", " + std::to_string(inner) + ", " +
                            std::to_string(width) + "] gap " + std::to_string(gap) + " shift " +
                            std::to_string(shift);
  const int64_t inner_stride = width + gap;
  const int64_t outer_stride = inner * inner_stride + 2 * gap;
  const int64_t rows = outer * inner;
  Tensor tensors[2] = {{dtype, outer * outer_stride, shift}, {dtype, outer * outer_stride, 0}};
  for (Tensor& tensor : tensors) {
    std::vector<float> values = normal(outer * outer_stride, 1.0f, 7);
    const float factors[] = {1.0f, 1e-30f, 1e30f, 0.0f, 1.0f, 1e-4f};
    for (int64_t i = 0; i < rows; ++i) {
      float* row = values.data() + i / inner * outer_stride + i % inner * inner_stride;
      for (int64_t h = 0; h < width; ++h) row[h] *= factors[i % 6];
      if (i % 6 == 4) row[width - 1] = i % 12 == 4 ? kNaN : -kInfinity;
    }
    tensor.set(values);
  }
  Array<float> got[2] = {Array<float>(rows), Array<float>(rows)};
  Array<float> wanted(rows);
  const auto params = [&](int i, Array<float>& norm) {
    return GradNormParams{
        {tensors[i].data(), dtype, rows, inner, outer_stride, inner_stride, width}, norm.data()};
  };
  const GradNormParams second = params(1, got[1]);
  expect_launched(cuda::grad_norm(params(0, got[0]), &second, nullptr), which);
  for (int i = 0; i < 2; ++i) {
    cpu::grad_norm(params(i, wanted), one_thread());
    for (int64_t row = 0; row < rows; ++row) {
      expect_close(got[i][row], wanted[row], 1e-6f, 0.0f, which, "row " + std::to_string(row));
    }
  }
}

void compare_scaled(DType dtype, DType to_dtype, int64_t width, int64_t shift, bool in_place) {
  const std::string which = std::string("scale ") + name_of(dtype) + " to " + name_of(to_dtype) +
                            " width " + std::to_string(width);
  constexpr int64_t kRows = 3;
  const int64_t stride = width + 3;
  Tensor from(dtype, kRows * stride - 3, shift);
  from.set(normal(kRows * stride, 1.0f, 5));
  Tensor wanted(to_dtype, kRows * width);
  Tensor own(to_dtype, in_place ? 0 : kRows * width, shift);
  Array<float> factor(1);
  factor[0] = 0.3f;
  ScaleParams params{from.data(), dtype, stride, wanted.data(), to_dtype,
                     width,       kRows, width,  factor.data()};
  cpu::scale(params, one_thread());
  params.to = in_place ? from.data() : own.data();
  params.to_row_stride = in_place ? stride : width;
  expect_launched(cuda::scale(params, nullptr), which);
  for (int64_t row = 0; row < kRows; ++row) {
    const void* got = offset(params.to, row * params.to_row_stride, to_dtype);
    const void* right = offset(wanted.data(), row * width, to_dtype);
    const auto bytes = static_cast<size_t>(width * size_of(to_dtype));
    expect(std::memcmp(got, right, bytes) == 0, which, "row " + std::to_string(row) + " differs");
  }
}

}  // namespace

void scale() {
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const DType dtype : kTypes) {
    for (const int64_t width : {1, 5, 1000, 9001}) compare_scaled(dtype, dtype, width, 0, true);
    for (const DType to : kTypes) compare_scaled(dtype, to, 777, 1, false);
  }
}

void grad_norm() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t width : {1, 7, 64, 1000, 2049}) compare_norms(dtype, 2, 9, width, 0, 0);
    compare_norms(dtype, 3, 6, 520, 8, 0);
    compare_norms(dtype, 1, 13, 333, 3, 1);
  }
  const GradNormParams none{{nullptr, DType::kFloat32, 0, 1, 1, 1, 8}, nullptr};
  expect_launched(cuda::grad_norm(none, nullptr, nullptr), "grad_norm of no rows");
}

}  // namespace leaf::driver

int main(int count, char** arguments) {
  using namespace leaf::driver;
  const struct {
    const char* name;
    void (*run)();
  } ops[] = {{"grad_norm", grad_norm},
             {"detect_spans", detect_spans},
             {"dual_kl", dual_kl},
             {"scale", scale},
             {"topk_kl", topk_kl}};
  for (const auto& [name, run] : ops) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(arguments[i], name) == 0;
    if (!wanted) continue;
    set_device("9.0", kAllShared);
    run();
    std::printf("%s: done\n", name);
    std::fflush(stdout);
  }
  if (failures != 0) std::printf("%d comparisons failed\n", failures);
  return failures == 0 ? 0 : 1;
}
