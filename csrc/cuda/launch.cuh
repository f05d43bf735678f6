#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace leaf::cuda {

// The caller is told of an error; what runs after it on this thread must not find it again.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// Blocks of a kernel, in clusters of `cluster` of them, and their dynamic shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;

  // `attribute` must live as long as the result.
  cudaLaunchConfig_t config(cudaLaunchAttribute& attribute, void* stream) const {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return config;
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, void* stream,
                   const Arguments&... arguments) {
  if (shape.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = shape.config(attribute, stream);
  return reported(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Whether the device can run at least one such cluster at a time.
template <class Kernel>
bool fits(Kernel* kernel, const Launch& shape) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = shape.config(attribute, nullptr);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  return reported(error) == cudaSuccess && clusters > 0;
}

}  // namespace leaf::cuda
