#pragma once

#include <cstddef>
#include <vector>

namespace leaf::emulation {

// The shared memory of a cluster's blocks.
//
// All shared variables are thread_local (cuda_runtime.h), so they are one stretch of memory of this
// CPU thread. The block that runs has its variables there, at home; those of the other blocks are
// kept in copies of that stretch. Under AddressSanitizer, what lies beyond the dynamic part must
// not be touched.
class SharedMemory {
 public:
  SharedMemory(unsigned blocks, size_t dynamic_bytes);
  ~SharedMemory();

  void start_cluster();
  void enter(unsigned rank);  // brings a block's variables home
  bool contains(const void* address) const;

 private:
  static constexpr unsigned kNobody = ~0u;
  void copy(unsigned char* to, const unsigned char* from) const;

  unsigned char* home_;
  size_t size_;
  size_t dynamic_begin_;  // offsets of the dynamic part
  size_t dynamic_end_;
  std::vector<std::vector<unsigned char>> copies_;  // by rank; none of who was at home only
  std::vector<unsigned char> caller_;               // what lay at home before the launch
  unsigned at_home_ = kNobody;
};

// More than any block may have.
constexpr size_t kSharedCapacity = 256 << 10;

}  // namespace leaf::emulation
