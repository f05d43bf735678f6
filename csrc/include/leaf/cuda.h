#pragma once

// What every CUDA launcher has in common: work is queued on `stream` (a cudaStream_t) of the
// current device, nothing waits for it, and the result is 0 or a cudaError_t.

namespace leaf::cuda {

const char* error_string(int error);

}  // namespace leaf::cuda
