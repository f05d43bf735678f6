// Functions that a GPU computes approximately.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdlib>

namespace leaf::emulation {
namespace {

struct Exp2Error {
  double most = 0.0;  // the largest relative error
  uint64_t seed = 0;

  Exp2Error() {
    if (const char* value = std::getenv("LEAF_EMULATION_EXP2_ERROR")) most = std::atof(value);
    if (const char* value = std::getenv("LEAF_EMULATION_SEED")) seed = std::atoll(value);
  }

  // Returns the error for an argument, from -most to most; equal in every call.
  double of(float x) const {
    uint64_t bits = __float_as_uint(x) + (seed << 32);  // mixed as splitmix64 does it
    bits += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    bits ^= bits >> 31;
    return most * (static_cast<double>(bits >> 11) * 0x1p-52 - 1.0);
  }
};

}  // namespace

float exp2_nearly(float x) {
  static const Exp2Error error;
  if (error.most == 0.0 || x == 0.0f) return exp2f(x);  // 2^0 is exactly 1, as on a GPU
  return static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + error.of(x)));
}

}  // namespace leaf::emulation
