#include <cuda_runtime.h>

#include "leaf/cuda.h"

namespace leaf::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace leaf::cuda
