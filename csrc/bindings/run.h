#pragma once

// Runs an op's kernel on the device of its tensors.
//
// LEAF_CUDA is set in a build with CUDA kernels. LEAF_EMULATE_CUDA is set in a test build that runs
// the CUDA kernels on the CPU (tests/cuda_emulation).

#include "check.h"
#include "leaf/threads.h"

#ifdef LEAF_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#if defined(LEAF_CUDA) || defined(LEAF_EMULATE_CUDA)
#include "leaf/cuda.h"
#endif

namespace leaf::bindings {

// The threads of torch, whose number torch.set_num_threads sets.
inline Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(
                0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

inline bool on_gpu([[maybe_unused]] const Tensor& tensor) {
#if defined(LEAF_EMULATE_CUDA)
  return true;
#elif defined(LEAF_CUDA)
  return tensor.is_cuda();
#else
  return false;
#endif
}

// Calls cpu_kernel(threads), or gpu_kernel(stream) with the current stream of the tensor's device,
// which returns a cudaError_t.
template <class CpuKernel, class GpuKernel>
void run([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& tensor,
         const CpuKernel& cpu_kernel, [[maybe_unused]] const GpuKernel& gpu_kernel) {
#if defined(LEAF_CUDA) || defined(LEAF_EMULATE_CUDA)
  if (on_gpu(tensor)) {
    void* stream = nullptr;
#ifdef LEAF_CUDA
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    const auto status = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
    check(status == 0, op, ": torch gave no stream for GPU ", tensor.get_device_index());
#endif
    const int error = gpu_kernel(stream);
    check(error == 0, op, ": the CUDA kernel could not be launched for a first tensor of shape ",
          shape_of(tensor), ": ", cuda::error_string(error));
    return;
  }
#endif
  cpu_kernel(torch_threads());
}

}  // namespace leaf::bindings

// Implements an op of the namespace leaf_ext on each device of the build.
#ifdef LEAF_CUDA
#define LEAF_IMPLEMENT(m, ...)                \
  STABLE_TORCH_LIBRARY_IMPL(leaf_ext, CPU, m) \
  __VA_ARGS__ STABLE_TORCH_LIBRARY_IMPL(leaf_ext, CUDA, m) __VA_ARGS__
#else
#define LEAF_IMPLEMENT(m, ...) STABLE_TORCH_LIBRARY_IMPL(leaf_ext, CPU, m) __VA_ARGS__
#endif
