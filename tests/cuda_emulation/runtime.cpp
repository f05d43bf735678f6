// The device seen by host code.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "scheduler.h"

asm(R"(
  .text
  .hidden leaf_switch_stacks
  .globl leaf_switch_stacks
  .type leaf_switch_stacks, @function
leaf_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size leaf_switch_stacks, . - leaf_switch_stacks
)");

namespace leaf::emulation {
namespace {

constexpr size_t kSharedByDefault = 48 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kPortableCluster = 8;

// An H100 or an A100: LEAF_EMULATION_CAPABILITY=9.0|8.0. LEAF_EMULATION_SHARED=bytes limits the
// shared memory of a block, so that small inputs do not fit.
struct Device {
  int major = 9;
  int processors = 132;
  size_t shared_of_block = 227 << 10;
  size_t shared_of_processor = 228 << 10;
};

Device device() {
  Device device;
  const char* capability = std::getenv("LEAF_EMULATION_CAPABILITY");
  if (capability != nullptr && std::atoi(capability) < 9) {
    device = {std::atoi(capability), 108, 163 << 10, 164 << 10};
  }
  if (const char* bytes = std::getenv("LEAF_EMULATION_SHARED"); bytes != nullptr) {
    device.shared_of_block = std::min<size_t>(device.shared_of_block, std::atol(bytes));
  }
  return device;
}

struct Attributes {
  size_t shared = kSharedByDefault;
  bool any_cluster = false;
};

// One launch at a time, from any thread. `last_error` is kept until it is read, as on a GPU.
std::mutex mutex;
std::map<const void*, Attributes> attributes;
cudaError_t last_error = cudaSuccess;

cudaError_t refuse(cudaError_t error, const std::string& why) {
  std::fprintf(stderr, "CUDA emulation: refused: %s\n", why.c_str());
  return last_error = error;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config.attrs[i].val.clusterDim;
    return size.x * size.y * size.z;
  }
  return 1;
}

std::string count(size_t n, const char* what) { return std::to_string(n) + " " + what; }

cudaError_t check(const cudaLaunchConfig_t& config, const Attributes& kernel) {
  const dim3& grid = config.gridDim;
  const unsigned threads = config.blockDim.x;
  const unsigned cluster = cluster_of(config);
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1) {
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + count(grid.x, "x ") +
                                                     count(grid.y, "x ") + count(grid.z, "blocks"));
  }
  if (threads == 0 || threads > kMaxThreads || config.blockDim.y != 1 || config.blockDim.z != 1) {
    return refuse(cudaErrorInvalidConfiguration, count(threads, "threads in a block"));
  }
  if (config.dynamicSmemBytes > std::min(kernel.shared, device().shared_of_block)) {
    return refuse(
        cudaErrorInvalidValue,
        count(config.dynamicSmemBytes, "bytes of dynamic shared memory; the kernel may ") +
            "have " + count(std::min(kernel.shared, device().shared_of_block), "bytes"));
  }
  if (cluster == 1) return cudaSuccess;
  const unsigned largest = kernel.any_cluster ? kMaxCluster : kPortableCluster;
  if (device().major < 9 || cluster == 0 || cluster > largest || grid.x % cluster != 0) {
    return refuse(cudaErrorInvalidClusterSize,
                  "clusters of " + count(cluster, "blocks, ") + count(grid.x, "blocks in all"));
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes[kernel].any_cluster = value != 0;
    return cudaSuccess;
  }
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (value < 0 || static_cast<size_t>(value) > device().shared_of_block) {
    return refuse(cudaErrorInvalidValue, "a kernel that may have " + std::to_string(value) +
                                             " bytes of dynamic shared memory");
  }
  attributes[kernel].shared = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard lock(mutex);
  *clusters = 0;
  const cudaError_t error = check(config, attributes[kernel]);
  if (error != cudaSuccess) return error;
  constexpr size_t kReserved = 1 << 10;  // bytes that the system takes of each block
  constexpr size_t kThreadsOfProcessor = 2048;
  const size_t blocks =
      std::min(kThreadsOfProcessor / config.blockDim.x,
               device().shared_of_processor / (config.dynamicSmemBytes + kReserved));
  *clusters = static_cast<int>(blocks * device().processors / cluster_of(config));
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& body) {
  const std::lock_guard lock(mutex);
  const cudaError_t error = check(config, attributes[kernel]);
  if (error != cudaSuccess) return error;
  if (std::getenv("LEAF_EMULATION_TRACE") != nullptr) {
    std::fprintf(stderr, "CUDA emulation: blocks %u threads %u cluster %u shared %zu\n",
                 config.gridDim.x * config.gridDim.y, config.blockDim.x, cluster_of(config),
                 config.dynamicSmemBytes);
  }
  Launch(kernel, config.gridDim, config.blockDim.x, cluster_of(config), config.dynamicSmemBytes,
         body)
      .run();
  return cudaSuccess;
}

unsigned block_rank() { return active->running->block->rank; }
unsigned blocks_in_cluster() { return active->blocks_in_cluster; }
void sync_block(Where where) { active->sync_block({where, __builtin_return_address(0)}); }
void arrive_in_cluster(Where where) {
  active->arrive_in_cluster({where, __builtin_return_address(0)});
}
void wait_for_cluster(Where where) {
  active->wait_for_cluster({where, __builtin_return_address(0)});
}

}  // namespace leaf::emulation

using namespace leaf::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device now = device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = now.major;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(now.shared_of_block);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(now.shared_of_processor);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
