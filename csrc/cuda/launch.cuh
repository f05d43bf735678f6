#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace leaf::cuda {

// Returns the error to the caller and clears it, so that later calls on this thread do not see it.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// The number of blocks, their threads and dynamic shared memory, and the blocks of a cluster.
struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;

  // `attribute` must outlive the result.
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

// Returns whether the device can run at least one such cluster at a time.
template <class Kernel>
bool fits(Kernel* kernel, const Launch& shape) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = shape.config(attribute, nullptr);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  return reported(error) == cudaSuccess && clusters > 0;
}

}  // namespace leaf::cuda
