#include "shared_memory.h"

#include <link.h>

// Functions of AddressSanitizer, if the program has it.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* begin, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
}

// The symbol of dynamic shared memory, common to all kernels (csrc/cuda/device.cuh).
namespace leaf::cuda {
alignas(128) thread_local unsigned char leaf_dynamic_shared[leaf::emulation::kSharedCapacity];
}

namespace leaf::emulation {
namespace {

struct Stretch {
  unsigned char* begin;
  size_t size;
};

// All thread_local variables of this program or library in this CPU thread. Variables that do not
// belong to a kernel are restored when the launch ends.
Stretch thread_local_variables() {
  Stretch found{};
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = info->dlpi_phdr[i];
      if (part.p_type != PT_TLS) continue;
      auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
      const unsigned char* wanted = leaf::cuda::leaf_dynamic_shared;
      if (begin <= wanted && wanted < begin + part.p_memsz) {
        *static_cast<Stretch*>(result) = {begin, part.p_memsz};
        return 1;
      }
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

// memcpy and memset are not used, because sanitizers check them.
void copy_bytes(unsigned char* to, const unsigned char* from, size_t size) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}
void fill_bytes(unsigned char* begin, size_t size) {
  asm volatile("rep stosb" : "+D"(begin), "+c"(size) : "a"(0xff) : "memory");
}

void poison(unsigned char* begin, size_t size) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(begin, size);
}
void unpoison(unsigned char* begin, size_t size) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(begin, size);
}

}  // namespace

SharedMemory::SharedMemory(unsigned blocks, size_t dynamic_bytes) : copies_(blocks) {
  const Stretch stretch = thread_local_variables();
  home_ = stretch.begin;
  size_ = stretch.size;
  dynamic_begin_ = static_cast<size_t>(leaf::cuda::leaf_dynamic_shared - home_);
  dynamic_end_ = dynamic_begin_ + dynamic_bytes;
  caller_.resize(size_);
  copy(caller_.data(), home_);
  poison(home_ + dynamic_end_, kSharedCapacity - dynamic_bytes);
}

SharedMemory::~SharedMemory() {
  unpoison(home_ + dynamic_end_, dynamic_begin_ + kSharedCapacity - dynamic_end_);
  copy(home_, caller_.data());
}

void SharedMemory::start_cluster() {
  for (auto& copy : copies_) copy.clear();
  at_home_ = kNobody;
}

void SharedMemory::enter(unsigned rank) {
  if (rank == at_home_) return;
  if (at_home_ != kNobody) {
    copies_[at_home_].resize(size_);
    copy(copies_[at_home_].data(), home_);
  }
  if (copies_[rank].empty()) {
    fill_bytes(home_, dynamic_end_);
    const size_t after = dynamic_begin_ + kSharedCapacity;
    fill_bytes(home_ + after, size_ - after);
  } else {
    copy(home_, copies_[rank].data());
  }
  at_home_ = rank;
}

void SharedMemory::copy(unsigned char* to, const unsigned char* from) const {
  const size_t after = dynamic_begin_ + kSharedCapacity;
  copy_bytes(to, from, dynamic_end_);
  copy_bytes(to + after, from + after, size_ - after);
}

bool SharedMemory::contains(const void* address) const {
  const auto* byte = static_cast<const unsigned char*>(address);
  return byte >= home_ && byte < home_ + size_;
}

}  // namespace leaf::emulation
