#pragma once

// One GPU thread's own flow of control on a stack of its own. Switching takes some 20 instructions,
// where the C library's ucontext takes a system call. x86-64 only; nothing else here depends on the
// processor.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the CUDA emulation switches stacks in x86-64 assembly for Linux"
#endif

// Saves the registers that a function must keep on this stack and this stack in *from; goes on
// where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void leaf_switch_stacks(void** from, void* to);

// AddressSanitizer's, where the program has it.
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin,
                                                                    size_t size);

namespace leaf::emulation {

// Stacks, each above a page that may not be touched. Memory is used where it was written only.
class Stacks {
 public:
  void reserve(size_t count) {
    if (count <= count_) return;
    if (base_ != nullptr) {
      forget(base_, count_ * kSize);
      munmap(base_, count_ * kSize);
    }
    base_ = static_cast<unsigned char*>(mmap(nullptr, count * kSize, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) __builtin_trap();
    count_ = count;
    for (size_t i = 0; i < count; ++i) mprotect(base_ + i * kSize, kPage, PROT_NONE);
  }

  // What leaf_switch_stacks takes to enter `function` on stack `index`. It must never return.
  void* start(size_t index, void (*function)()) const {
    auto** top = reinterpret_cast<void**>(base_ + (index + 1) * kSize);
    forget(base_ + (index + 1) * kSize - kPage, kPage);  // the frame that the last one ended in
    top[-1] = nullptr;                                   // where a caller's address would be
    top[-2] = reinterpret_cast<void*>(function);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // registers
    return top - 8;
  }

  bool contain(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= base_ && byte < base_ + count_ * kSize;
  }

 private:
  // AddressSanitizer remembers variables of frames that nobody returned from, also when the memory
  // has become somebody else's.
  static void forget(const void* begin, size_t size) {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(begin, size);
  }

  static constexpr size_t kSize = 256 << 10;
  static constexpr size_t kPage = 4096;
  unsigned char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace leaf::emulation
