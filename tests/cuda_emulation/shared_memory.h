#pragma once

#include <cstddef>
#include <vector>

namespace leaf::emulation {

// The shared memory of a cluster's blocks.
//
// All shared variables are thread_local (cuda_runtime.h), so they are one range of memory of this
// CPU thread, the home range. It contains the variables of the running block; those of the other
// blocks are in copies of the range. AddressSanitizer guards the memory beyond the dynamic part.
class SharedMemory {
 public:
  SharedMemory(unsigned blocks, size_t dynamic_bytes);
  ~SharedMemory();

  void start_cluster();
  void enter(unsigned rank);  // copies a block's variables to the home range
  bool contains(const void* address) const;

 private:
  static constexpr unsigned kNobody = ~0u;
  void copy(unsigned char* to, const unsigned char* from) const;

  unsigned char* home_;
  size_t size_;
  size_t dynamic_begin_;  // offsets of the dynamic part
  size_t dynamic_end_;
  std::vector<std::vector<unsigned char>>
      copies_;                         // by rank; none for a block that never left the home range
  std::vector<unsigned char> caller_;  // the home range before the launch
  unsigned at_home_ = kNobody;
};

// More than any block may use.
constexpr size_t kSharedCapacity = 256 << 10;

}  // namespace leaf::emulation
