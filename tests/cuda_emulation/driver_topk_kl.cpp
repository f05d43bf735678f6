#include "driver.h"
#include "leaf/cuda.h"
#include "leaf/topk_kl.h"

namespace leaf::driver {
namespace {

enum class Gradient { kNone, kOwn, kInPlace, kNarrower };

struct Case {
  DType dtype;
  int64_t vocab;
  int64_t k;
  int64_t gap;    // between rows
  int64_t shift;  // of the first row
  Gradient gradient;
  bool measures;
  float scale = 1.0f;
  float softcap = 0.0f;
};

constexpr int64_t kRows = 5;

struct Inputs {
  explicit Inputs(const Case& c)
      : student(c.dtype, kRows * (c.vocab + c.gap) - c.gap, c.shift),
        ids(kRows * c.k),
        logprobs(kRows * c.k),
        tail(kRows),
        weight(kRows) {
    student.set(normal(kRows * (c.vocab + c.gap), 3.0f, 1));
    const float weights[kRows] = {0.25f, 2.0f, 0.0f, 0.125f, 1.0f};
    for (int64_t row = 0; row < kRows; ++row) {
      const float mass = c.k == c.vocab ? 1.0f : 0.9f;
      for (int64_t j = 0; j < c.k; ++j) {
        // Distinct ids from both ends. The second one of the first row is outside of the
        // vocabulary, and has no probability.
        const bool outside = row == 0 && c.k > 2 && j == 1;
        const int64_t inside = c.k - (row == 0 && c.k > 2 ? 1 : 0);
        ids[row * c.k + j] = outside ? int64_t{1} << 40 : j % 2 == 0 ? j / 2 : c.vocab - 1 - j / 2;
        logprobs[row * c.k + j] =
            outside ? -kInfinity : std::log(mass / static_cast<float>(inside));
      }
      tail[row] = std::log(1.0f - mass);
      weight[row] = weights[row];
    }
  }
  Tensor student;
  Array<int64_t> ids;
  Array<float> logprobs;
  Array<float> tail;
  Array<float> weight;
};

struct Results {
  explicit Results(bool measures) : loss(1), scale(1), rows(measures ? 4 * kRows : 0) {}
  Array<float> loss;
  Array<float> scale;
  Array<float> rows;
};

TopkKLParams params_of(const Case& c, Inputs& inputs, Results& results) {
  TopkKLParams params{};
  params.student = {inputs.student.data(), c.dtype, c.vocab + c.gap, c.vocab, c.scale, c.softcap};
  params.ids = inputs.ids.data();
  params.logprobs = inputs.logprobs.data();
  params.tail = inputs.tail.data();
  params.k = c.k;
  params.row_weight = inputs.weight.data();
  params.rows = kRows;
  params.temperature = 1.5f;
  params.loss = results.loss.data();
  params.grad_scale = results.scale.data();
  params.row_results = c.measures ? results.rows.data() : nullptr;
  return params;
}

void compare_gradients(const Case& c, const TopkKLParams& params, Tensor& wanted, float scale,
                       const std::string& which) {
  const std::vector<float> reference = wanted.get();
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<float> line(static_cast<size_t>(c.vocab));
    const void* start = offset(params.grad, row * params.grad_row_stride, params.grad_dtype);
    const float* grad = cpu::load_floats(start, params.grad_dtype, c.vocab, line.data());
    for (int64_t v = 0; v < c.vocab; ++v) {
      expect_close(grad[v], reference[static_cast<size_t>(row * c.vocab + v)],
                   2.5f * rounding(params.grad_dtype), 4e-7f * scale, which,
                   "gradient " + std::to_string(row) + ", " + std::to_string(v));
    }
  }
}

void compare(const Case& c, const std::string& which) {
  Inputs inputs(c);
  Results wanted(c.measures);
  Tensor wanted_grad(c.dtype, kRows * c.vocab);
  TopkKLParams params = params_of(c, inputs, wanted);
  if (c.gradient != Gradient::kNone) params.grad = wanted_grad.data();
  params.grad_dtype = c.dtype;
  params.grad_row_stride = c.vocab;
  cpu::topk_kl(params, one_thread());

  Results got(c.measures);
  const bool in_place = c.gradient == Gradient::kInPlace || c.gradient == Gradient::kNarrower;
  const DType dtype = c.gradient == Gradient::kNarrower ? DType::kBFloat16 : c.dtype;
  Tensor own(dtype, in_place ? 0 : kRows * c.vocab, c.shift);
  params = params_of(c, inputs, got);
  if (c.gradient != Gradient::kNone) params.grad = in_place ? inputs.student.data() : own.data();
  params.grad_dtype = dtype;
  params.grad_row_stride =
      in_place ? (c.vocab + c.gap) * size_of(c.dtype) / size_of(dtype) : c.vocab;
  Array<float> scratch(cuda::topk_kl_scratch(params));
  expect_launched(cuda::topk_kl(params, scratch.data(), nullptr), which);

  expect_close(got.loss[0], wanted.loss[0], 1e-5f, 1e-6f, which, "loss");
  for (int64_t i = 0; i < wanted.rows.size(); ++i) {
    expect_close(got.rows[i], wanted.rows[i], 1e-5f, 1e-6f, which, "row " + std::to_string(i));
  }
  if (c.gradient == Gradient::kNone) return;
  expect(got.scale[0] == wanted.scale[0], which, "the scale of the gradient differs");
  compare_gradients(c, params, wanted_grad, wanted.scale[0], which);
}

}  // namespace

void topk_kl() {
  constexpr DType k32 = DType::kFloat32;
  constexpr DType k16 = DType::kFloat16;
  constexpr DType kB16 = DType::kBFloat16;
  const Case cases[] = {
      {k32, 1, 1, 0, 0, Gradient::kOwn, true},
      {k32, 50, 50, 0, 0, Gradient::kOwn, true, 1.25f},
      {kB16, 1000, 7, 0, 0, Gradient::kOwn, false},
      {k16, 777, 600, 3, 1, Gradient::kOwn, true, 1.25f, 20.0f},
      {kB16, 3001, 64, 0, 3, Gradient::kInPlace, false},
      {k32, 5003, 1024, 4, 0, Gradient::kNarrower, true},
      {k32, 4100, 9, 0, 1, Gradient::kNarrower, false, 1.0f, 5.0f},
      {k16, 5120, 33, 0, 0, Gradient::kNone, true, 1.25f},
      {k32, 1203, 2, 5, 0, Gradient::kInPlace, true},
  };
  set_device("9.0", kAllShared);
  int number = 0;
  for (const Case& c : cases) compare(c, "topk_kl case " + std::to_string(number++));
  Results results(false);
  TopkKLParams none{};
  none.student = {nullptr, k32, 8, 8, 1.0f, 0.0f};
  none.k = 1;
  none.temperature = 1.0f;
  none.loss = results.loss.data();
  none.grad_scale = results.scale.data();
  expect_launched(cuda::topk_kl(none, nullptr, nullptr), "topk_kl of no rows");
  expect(results.loss[0] == 0.0f, "topk_kl of no rows", "the loss is not 0");
}

}  // namespace leaf::driver
