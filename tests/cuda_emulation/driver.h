#pragma once

// Runs an op of csrc/cuda and its CPU kernel on the same inputs, and compares.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "leaf/dtype.h"
#include "leaf/threads.h"

namespace leaf::driver {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The number of comparisons that failed.
inline int failures = 0;

// Memory of exactly the requested size, `shift` elements off its natural alignment, filled with
// bytes 0xFF. AddressSanitizer guards its end, and its start if it is not shifted.
template <class T>
class Array {
 public:
  explicit Array(int64_t size, int64_t shift = 0)
      : memory_(new T[static_cast<size_t>(size + shift)]), shift_(shift), size_(size) {
    std::memset(memory_.get(), 0xff, static_cast<size_t>(size + shift) * sizeof(T));
  }
  T* data() { return memory_.get() + shift_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t shift_;
  int64_t size_;
};

// A tensor of any dtype; its contents are read and written as float32.
class Tensor {
 public:
  Tensor(DType dtype, int64_t size, int64_t shift = 0)
      : dtype_(dtype), bytes_(size * size_of(dtype), shift * size_of(dtype)), size_(size) {}
  void* data() { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  void set(const std::vector<float>& values) {
    cpu::store_floats(values.data(), size_, dtype_, data());
  }
  std::vector<float> get() {
    std::vector<float> values(static_cast<size_t>(size_));
    const float* from = cpu::load_floats(data(), dtype_, size_, values.data());
    if (from != values.data()) std::memcpy(values.data(), from, values.size() * sizeof(float));
    return values;
  }

 private:
  DType dtype_;
  Array<unsigned char> bytes_;
  int64_t size_;
};

inline std::vector<float> normal(int64_t size, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = distribution(random);
  return values;
}

inline Threads one_thread() {
  return {1, [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
            if (n > 0) body(0, n, context);
          }};
}

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

// Half a unit in the last place, as a relative error.
inline float rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24f : dtype == DType::kFloat16 ? 0x1p-11f : 0x1p-8f;
}

inline void expect(bool right, const std::string& which, const std::string& what) {
  if (right) return;
  ++failures;
  if (failures <= 20) std::printf("%s: %s\n", which.c_str(), what.c_str());
}

inline void expect_close(float got, float wanted, float relative, float absolute,
                         const std::string& which, const std::string& what) {
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  const bool close = std::fabs(got - wanted) <= absolute + relative * std::fabs(wanted);
  expect(same || close, which,
         what + " is " + std::to_string(got) + ", the CPU's " + std::to_string(wanted));
}

inline void expect_launched(int error, const std::string& which) {
  expect(error == 0, which, "error " + std::to_string(error));
}

// Sets the shared memory of blocks, and whether there are clusters, until the next call.
inline void set_device(const char* capability, int64_t shared_bytes) {
  setenv("LEAF_EMULATION_CAPABILITY", capability, 1);
  setenv("LEAF_EMULATION_SHARED", std::to_string(shared_bytes).c_str(), 1);
}
constexpr int64_t kAllShared = 1 << 20;

void grad_norm();
void detect_spans();
void dual_kl();
void scale();
void topk_kl();

}  // namespace leaf::driver
