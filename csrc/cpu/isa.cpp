#include "simd.h"

namespace leaf::cpu {

#ifdef LEAF_SINGLE_ISA
const char* instruction_set() { return LEAF_SINGLE_ISA; }
#else
// Dispatches as LEAF_CLONES does, so that the answer names the instructions of the kernels.
namespace {
__attribute__((target("arch=x86-64-v4"))) const char* chosen() { return "x86-64-v4"; }
__attribute__((target("arch=x86-64-v3"))) const char* chosen() { return "x86-64-v3"; }
__attribute__((target("default"))) const char* chosen() { return "baseline"; }
}  // namespace

const char* instruction_set() { return chosen(); }
#endif

}  // namespace leaf::cpu
