#include "driver.h"
#include "leaf/detect_spans.h"

namespace leaf::driver {
namespace {

struct Case {
  std::vector<int64_t> offsets;  // if empty, sequences have max_length
  int64_t sequences;
  int64_t max_length;
  double domain_share;
  bool prunable;
  bool quantile;
  double threshold;
  double teacher_max;
  int64_t join_gap;
  int64_t min_length;
  bool special;  // a NaN, an inf, a constant sequence
  bool log_scale = false;
  double student_weight = 1.0;
};

class Outputs {
 public:
  Outputs(int64_t sequences, int64_t max_spans, int64_t tokens)
      : span(sequences * max_spans * 2),
        count(sequences),
        score(tokens),
        confounder(tokens),
        status(sequences) {}

  DetectSpansParams of(DetectSpansParams params) {
    params.span = span.data();
    params.count = count.data();
    params.score = score.data();
    params.confounder = confounder.data();
    params.status = status.data();
    return params;
  }

  Array<int64_t> span;
  Array<int64_t> count;
  Array<float> score;
  Array<uint8_t> confounder;
  Array<int64_t> status;
};

template <class T>
void expect_equal(Array<T>& got, Array<T>& wanted, const std::string& which, const char* what) {
  for (int64_t i = 0; i < wanted.size(); ++i) {
    expect(got[i] == wanted[i] || (got[i] != got[i] && wanted[i] != wanted[i]), which,
           what + std::string(" ") + std::to_string(i) + " is " + std::to_string(got[i]) +
               ", the CPU's " + std::to_string(wanted[i]));
  }
}

void fill(Array<float>& norms, unsigned seed) {
  const std::vector<float> values = normal(norms.size(), 1.0f, seed);
  for (int64_t i = 0; i < norms.size(); ++i) norms[i] = std::fabs(values[static_cast<size_t>(i)]);
}

void fill(Array<uint8_t>& mask, double share, unsigned seed) {
  std::mt19937 random(seed);
  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random() % 1000 < 1000 * share ? 1 : 0;
}

void compare(const Case& c, const std::string& which) {
  const int64_t tokens = c.offsets.empty() ? c.sequences * c.max_length : c.offsets.back();
  Array<float> teacher(tokens);
  Array<float> student(tokens);
  Array<uint8_t> domain(tokens);
  Array<uint8_t> prunable(tokens);
  Array<int64_t> offsets(static_cast<int64_t>(c.offsets.size()));
  fill(teacher, 1);
  fill(student, 2);
  fill(domain, c.domain_share, 3);
  fill(prunable, 0.8, 4);
  std::copy(c.offsets.begin(), c.offsets.end(), offsets.data());
  if (c.special) {
    domain[3] = domain[c.max_length + 5] = domain[2 * c.max_length + 1] = 1;
    teacher[3] = kNaN;
    student[c.max_length + 5] = kInfinity;
    for (int64_t i = 0; i < c.max_length; ++i) {
      teacher[2 * c.max_length + i] = student[2 * c.max_length + i] = 0.5f;
    }
  }
  DetectSpansParams params{};
  params.teacher = teacher.data();
  params.student = student.data();
  params.domain = domain.data();
  params.prunable = c.prunable ? prunable.data() : nullptr;
  params.offsets = c.offsets.empty() ? nullptr : offsets.data();
  params.tokens = tokens;
  params.sequences = c.sequences;
  params.max_length = c.max_length;
  params.max_spans = (c.max_length + 1) / 2;
  params.set_scale(c.log_scale, c.student_weight);
  params.threshold = c.threshold;
  params.quantile = c.quantile;
  params.cap = 0.5;
  params.teacher_max = c.teacher_max;
  params.join_gap = c.join_gap;
  params.min_length = c.min_length;
  Outputs got(c.sequences, params.max_spans, tokens);
  Outputs wanted(c.sequences, params.max_spans, tokens);
  expect_launched(cuda::detect_spans(got.of(params), nullptr), which);
  cpu::detect_spans(wanted.of(params), one_thread());
  expect_equal(got.status, wanted.status, which, "status");
  // Logarithms are rounded differently. In these cases no score is so near the cut that it matters.
  for (int64_t i = 0; i < tokens; ++i) {
    const float absolute = c.log_scale ? 2e-6f : 0.0f;
    expect_close(got.score[i], wanted.score[i], 0.0f, absolute, which,
                 "score " + std::to_string(i));
  }
  expect_equal(got.confounder, wanted.confounder, which, "confounder");
  expect_equal(got.count, wanted.count, which, "count");
  expect_equal(got.span, wanted.span, which, "span");
}

}  // namespace

void detect_spans() {
  constexpr double kUnbounded = std::numeric_limits<double>::infinity();
  const Case cases[] = {
      {{}, 1, 1, 1.0, false, false, 0.1, kUnbounded, 0, 1, false},
      {{}, 3, 40, 0.9, false, false, 0.5, kUnbounded, 0, 1, true},
      {{}, 4, 300, 0.7, true, false, 0.4, kUnbounded, 1, 2, true},
      {{}, 3, 300, 0.9, true, true, 0.3, 0.7, 2, 1, true},
      {{}, 2, 1500, 0.95, false, true, 0.2, kUnbounded, 3, 2, false},
      {{}, 1, 9000, 0.9, true, true, 0.25, kUnbounded, 1, 1, false},
      {{0, 0, 33, 290, 291, 700}, 5, 420, 0.8, false, true, 0.5, kUnbounded, 40, 1, false},
      {{0, 64, 96, 97}, 3, 64, 1.0, true, false, 1.0, 0.9, 0, 1, false},
      {{}, 2, 70, 0.0, false, true, 0.5, kUnbounded, 0, 1, false},
      {{}, 3, 300, 0.9, true, true, 0.3, 0.7, 2, 1, true, false, 0.3},
      {{}, 3, 300, 0.9, true, false, 0.4, 0.7, 2, 1, true, true},
      {{}, 3, 40, 0.9, false, true, 0.5, kUnbounded, 0, 1, true, true, 0.3},
      {{0, 0, 33, 290, 300}, 4, 257, 0.8, false, true, 0.5, kUnbounded, 1, 1, false, true, 2.0},
  };
  int number = 0;
  for (const Case& c : cases) compare(c, "detect_spans case " + std::to_string(number++));
}

}  // namespace leaf::driver
