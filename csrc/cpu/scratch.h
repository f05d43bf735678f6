#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace leaf::cpu {

// Aligned memory for some floats. A thread keeps it between calls, because mapping fresh pages
// takes as long as computing several rows. Large buffers are released.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(std::move(kept())) {
    if (memory_.size < size) memory_ = Memory(size);
  }
  ~Scratch() {
    constexpr int64_t kMostKept = int64_t{1} << 22;  // 16 MiB
    if (memory_.size <= kMostKept && memory_.size > kept().size) kept() = std::move(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return memory_.data.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  struct Memory {
    std::unique_ptr<float, Delete> data;
    int64_t size = 0;

    Memory() = default;
    explicit Memory(int64_t n)
        : data(static_cast<float*>(
              ::operator new(static_cast<size_t>(n) * sizeof(float), kAlignment))),
          size(n) {}
    Memory(Memory&& other) noexcept : data(std::move(other.data)), size(other.size) {
      other.size = 0;
    }
    Memory& operator=(Memory&& other) noexcept {
      data = std::move(other.data);
      size = other.size;
      other.size = 0;
      return *this;
    }
  };
  static Memory& kept() {
    thread_local Memory memory;
    return memory;
  }

  Memory memory_;
};

}  // namespace leaf::cpu
