#pragma once

// The control flow of one GPU thread, on its own stack. Switching takes about 20 instructions; the
// C library's ucontext would need a system call. This file is for x86-64 only; nothing else here
// depends on the processor.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the CUDA emulation switches stacks in x86-64 assembly for Linux"
#endif

// Saves the callee-saved registers on this stack and the stack pointer in *from, and continues
// where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void leaf_switch_stacks(void** from, void* to);

// Functions of AddressSanitizer, if the program has it.
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin,
                                                                    size_t size);

namespace leaf::emulation {

// Stacks, each above an inaccessible page. Only pages that were written use memory.
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

  // Returns the pointer with which leaf_switch_stacks enters `function`, which must not return.
  void* start(size_t index, void (*function)()) const {
    auto** top = reinterpret_cast<void**>(base_ + (index + 1) * kSize);
    forget(base_ + (index + 1) * kSize - kPage, kPage);  // the last frame of the previous thread
    top[-1] = nullptr;                                   // the place of a caller's address
    top[-2] = reinterpret_cast<void*>(function);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // registers
    return top - 8;
  }

  bool contain(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= base_ && byte < base_ + count_ * kSize;
  }

 private:
  // AddressSanitizer keeps the variables of frames that did not return, also after the memory has
  // been reused.
  static void forget(const void* begin, size_t size) {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(begin, size);
  }

  static constexpr size_t kSize = 256 << 10;
  static constexpr size_t kPage = 4096;
  unsigned char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace leaf::emulation
