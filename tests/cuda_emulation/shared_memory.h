#pragma once

#include <cstddef>
#include <vector>

namespace leaf::emulation {

// The shared memory of a cluster's blocks.
//
// All shared variables are thread_local (cuda_runtime.h), so they are one stretch of memory of this
// CPU thread. The block that runs has its variables there, at home; those of the other blocks are
// kept in copies of that stretch, and there other blocks find them, too. Under AddressSanitizer,
// what lies beyond the dynamic part, and all of a block that has not started or has ended, must not
// be touched.
class SharedMemory {
 public:
  SharedMemory(unsigned blocks, size_t dynamic_bytes);
  ~SharedMemory();

  void start_cluster();
  void enter(unsigned rank);  // brings a block's variables home
  void end_block();           // of the block that is at home

  // Where block `rank` has what the block at home has at `address`; null if that is not shared.
  void* in_block(const void* address, unsigned rank) const;
  // One address for all blocks' views of a shared variable; null if `address` is not shared. `dead`
  // is whether it belongs to a block that has not started or has ended.
  const void* canonical(const void* address, bool* dead) const;

 private:
  struct Copy {
    unsigned char* begin;
    bool started;
    bool ended;
  };
  static constexpr unsigned kNobody = ~0u;
  bool is_home(const void* address) const;
  const void* in_copy(const void* address) const;
  void copy(unsigned char* to, const unsigned char* from) const;

  unsigned char* home_;
  size_t size_;
  size_t dynamic_begin_;  // offsets of the dynamic part
  size_t dynamic_end_;
  std::vector<Copy> copies_;           // by rank; none where blocks are clusters by themselves
  std::vector<unsigned char> caller_;  // what lay at home before the launch
  unsigned at_home_ = kNobody;
};

// More than any block may have.
constexpr size_t kSharedCapacity = 256 << 10;

}  // namespace leaf::emulation
