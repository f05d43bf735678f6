#include "driver.h"
#include "leaf/cuda.h"
#include "leaf/dual_kl.h"

namespace leaf::driver {
namespace {

enum class Gradient { kNone, kOwn, kInPlace, kNarrower };

struct Case {
  const char* capability;
  int64_t shared_bytes;  // determines the size of the clusters and the overflow of a row
  DType dtype;
  int64_t student_vocab;
  int64_t teacher_vocab;
  int64_t gap;    // between rows
  int64_t shift;  // of the first row
  Gradient gradient;
  bool measures;
  float scale = 1.0f;  // of the student's logits
  float softcap = 0.0f;
  float beta = 0.0f;  // the divergence
};

constexpr int64_t kRows = 5;

class Inputs {
 public:
  explicit Inputs(const Case& c)
      : student(c.dtype, kRows * (c.student_vocab + c.gap) - c.gap, c.shift),
        teacher(c.dtype, kRows * (c.teacher_vocab + c.gap) - c.gap, c.shift),
        weight(kRows) {
    std::vector<float> z_s = normal(kRows * (c.student_vocab + c.gap), 3.0f, 1);
    std::vector<float> z_t = normal(kRows * (c.teacher_vocab + c.gap), 3.0f, 2);
    for (int64_t v = 0; v < c.student_vocab && v < c.teacher_vocab; ++v) {
      // In the second row the models nearly agree; in the fourth the teacher allows few tokens.
      const auto second = static_cast<size_t>(c.student_vocab + c.gap + v);
      z_s[second] = z_t[static_cast<size_t>(c.teacher_vocab + c.gap + v)] + 0.01f * z_s[second];
      if (v % 3 != 0) z_t[static_cast<size_t>(3 * (c.teacher_vocab + c.gap) + v)] = -kInfinity;
    }
    student.set(z_s);
    teacher.set(z_t);
    const float weights[kRows] = {0.25f, 2.0f, 0.0f, 0.125f, 1.0f};
    for (int64_t i = 0; i < kRows; ++i) weight[i] = weights[i];
  }
  Tensor student;
  Tensor teacher;
  Array<float> weight;
};

struct Results {
  explicit Results(bool measures) : loss(1), scale(1), rows(measures ? 4 * kRows : 0) {}
  Array<float> loss;
  Array<float> scale;
  Array<float> rows;
};

DualKLParams params_of(const Case& c, Inputs& inputs, Results& results) {
  DualKLParams params{};
  params.student = {inputs.student.data(), c.dtype, c.student_vocab + c.gap,
                    c.student_vocab,       c.scale, c.softcap};
  params.teacher = {inputs.teacher.data(), c.dtype, c.teacher_vocab + c.gap,
                    c.teacher_vocab,       1.0f,    c.softcap};
  params.row_weight = inputs.weight.data();
  params.rows = kRows;
  params.temperature = 1.5f;
  params.beta = c.beta;
  params.rest = 1.0f - c.beta;
  params.slope_bound = c.beta == 1.0f ? 256.0f : 1.0f;
  params.loss = results.loss.data();
  params.grad_scale = results.scale.data();
  params.row_results = c.measures ? results.rows.data() : nullptr;
  return params;
}

void compare(const Case& c, const std::string& which) {
  set_device(c.capability, c.shared_bytes);
  Inputs inputs(c);
  const int64_t step = c.student_vocab + c.gap;

  // The CPU's gradient has the student's dtype.
  Results wanted(c.measures);
  Tensor wanted_grad(c.dtype, kRows * c.student_vocab);
  DualKLParams params = params_of(c, inputs, wanted);
  if (c.gradient != Gradient::kNone) params.grad = wanted_grad.data();
  params.grad_dtype = c.dtype;
  params.grad_row_stride = c.student_vocab;
  cpu::dual_kl(params, one_thread());

  Results got(c.measures);
  const bool in_place = c.gradient == Gradient::kInPlace || c.gradient == Gradient::kNarrower;
  const DType dtype = c.gradient == Gradient::kNarrower ? DType::kBFloat16 : c.dtype;
  Tensor own(dtype, in_place ? 0 : kRows * c.student_vocab, c.shift);
  params = params_of(c, inputs, got);
  if (c.gradient != Gradient::kNone) params.grad = in_place ? inputs.student.data() : own.data();
  params.grad_dtype = dtype;
  params.grad_row_stride = in_place ? step * size_of(c.dtype) / size_of(dtype) : c.student_vocab;
  Array<float> scratch(cuda::dual_kl_scratch(params));
  expect_launched(cuda::dual_kl(params, scratch.data(), nullptr), which);

  expect_close(got.loss[0], wanted.loss[0], 1e-5f, 1e-6f, which, "loss");
  for (int64_t i = 0; i < wanted.rows.size(); ++i) {
    expect_close(got.rows[i], wanted.rows[i], 1e-5f, 1e-6f, which, "row " + std::to_string(i));
  }
  if (c.gradient == Gradient::kNone) return;
  expect(got.scale[0] == wanted.scale[0], which, "the scale of the gradient differs");
  const float largest = 4.0f * wanted.scale[0];
  const std::vector<float> reference = wanted_grad.get();
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<float> line(static_cast<size_t>(c.student_vocab));
    const void* start = offset(params.grad, row * params.grad_row_stride, dtype);
    const float* grad = cpu::load_floats(start, dtype, c.student_vocab, line.data());
    for (int64_t v = 0; v < c.student_vocab; ++v) {
      expect_close(grad[v], reference[static_cast<size_t>(row * c.student_vocab + v)],
                   2.5f * rounding(dtype), 1e-7f * largest, which,
                   "gradient " + std::to_string(row) + ", " + std::to_string(v));
    }
  }
}

}  // namespace

void dual_kl() {
  constexpr DType k32 = DType::kFloat32;
  constexpr DType k16 = DType::kFloat16;
  constexpr DType kB16 = DType::kBFloat16;
  const Case cases[] = {
      {"9.0", kAllShared, k32, 1, 1, 0, 0, Gradient::kOwn, true, 1.25f},
      {"9.0", kAllShared, kB16, 1000, 1000, 0, 0, Gradient::kOwn, false},
      {"9.0", kAllShared, k16, 777, 776, 3, 1, Gradient::kOwn, true, 1.25f, 20.0f},
      {"9.0", 7000, k32, 1203, 1203, 5, 0, Gradient::kOwn, true, 1.25f},   // 2 blocks
      {"9.0", 4500, kB16, 3001, 2999, 0, 3, Gradient::kInPlace, false},    // 4 blocks
      {"9.0", 4000, k32, 2000, 2064, 4, 0, Gradient::kNarrower, true},     // 8 blocks
      {"9.0", 3000, k16, 5120, 5120, 0, 0, Gradient::kNone, true, 1.25f},  // 16 blocks
      {"9.0", 2000, kB16, 6001, 6001, 0, 0, Gradient::kOwn, true},         // with overflow
      {"9.0", 2000, k32, 3000, 2990, 0, 1, Gradient::kNarrower, false},    // with overflow
      {"9.0", 1500, k32, 6001, 6001, 0, 0, Gradient::kNarrower, false},    // in a single block
      {"9.0", 1500, k16, 6001, 6001, 0, 0, Gradient::kInPlace, false, 1.25f, 20.0f},  // most of it
      {"8.0", 4000, k32, 1100, 1090, 2, 1, Gradient::kNarrower, true, 1.25f},
      {"8.0", kAllShared, kB16, 900, 900, 0, 0, Gradient::kInPlace, true},
      // The other divergences; the teacher of the fourth row excludes tokens.
      {"9.0", kAllShared, k32, 1, 1, 0, 0, Gradient::kOwn, true, 1.25f, 0.0f, 0.5f},
      {"9.0", kAllShared, k16, 777, 776, 3, 1, Gradient::kOwn, true, 1.25f, 20.0f, 1.0f},
      {"9.0", 7000, k32, 1203, 1203, 5, 0, Gradient::kInPlace, false, 1.0f, 0.0f, 0.3f},
      {"9.0", 4500, kB16, 1501, 1499, 0, 3, Gradient::kInPlace, true, 1.0f, 20.0f, 1.0f},
      {"9.0", 4000, k16, 400, 400, 0, 0, Gradient::kNone, true, 1.25f, 0.0f, 0.5f},
      {"9.0", 2200, k32, 1000, 990, 0, 1, Gradient::kNarrower, false, 1.0f, 0.0f, 0.9f},
      {"9.0", 2500, k32, 1803, 1803, 0, 0, Gradient::kNarrower, true, 1.0f, 20.0f, 1.0f},
      {"8.0", 4000, k32, 1100, 1090, 2, 1, Gradient::kNarrower, true, 1.25f, 0.0f, 0.1f},
  };
  int number = 0;
  for (const Case& c : cases) compare(c, "dual_kl case " + std::to_string(number++));
  Results results(false);
  DualKLParams none{};
  none.student = none.teacher = {nullptr, k32, 8, 8, 1.0f, 0.0f};
  none.temperature = 1.0f;
  none.loss = results.loss.data();
  none.grad_scale = results.scale.data();
  expect_launched(cuda::dual_kl(none, nullptr, nullptr), "dual_kl of no rows");
  expect(results.loss[0] == 0.0f, "dual_kl of no rows", "the loss is not 0");
}

}  // namespace leaf::driver
