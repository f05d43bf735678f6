#pragma once

// Every CUDA launcher queues its work on `stream` (a cudaStream_t) of the current device, does not
// wait for it, and returns 0 or a cudaError_t.

namespace leaf::cuda {

const char* error_string(int error);

}  // namespace leaf::cuda
