// leaf_ext._memory: a pool for the memory of CPU tensors.
//
// A module of its own, because c10::Allocator is not part of torch's stable ABI: it is only loaded
// under the torch that it was built with.

#include <c10/core/Allocator.h>
#include <pybind11/pybind11.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

// Small blocks are the C library's: it keeps them by size, as this pool does with large ones.
constexpr size_t kLeast = size_t{1} << 15;

// While it is used, a block that is freed waits for the next tensor of its size. A C library would
// give parts of it to small objects that stay, and then has to take new memory for each tensor.
class Pool final : public c10::Allocator {
  using Idle = std::map<size_t, std::vector<void*>>;  // by size

 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never freed: tensors may outlive the interpreter
    return *pool;
  }

  void enter() {
    const std::lock_guard lock(mutex_);
    if (users_++ > 0) return;
    c10::Allocator* current = c10::GetAllocator(c10::kCPU);
    if (current->raw_deleter() == nullptr) return;  // its blocks cannot be kept by address
    base_ = current;
    c10::SetAllocator(c10::kCPU, this);
  }

  void leave() {
    Idle idle;
    {
      const std::lock_guard lock(mutex_);
      if (--users_ > 0) return;
      if (c10::GetAllocator(c10::kCPU) == this) c10::SetAllocator(c10::kCPU, base_);
      idle.swap(idle_);
      sizes_.clear();  // what is not idle goes back to the C library when it is freed
    }
    give_back(idle);
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast || !used()) return base_->allocate(bytes);
    void* block = nullptr;
    {
      const std::lock_guard lock(mutex_);
      const auto found = idle_.lower_bound(bytes);
      if (found != idle_.end() && found->first <= bytes + bytes / 8) {
        block = found->second.back();  // the last one is the likeliest to be in a cache
        found->second.pop_back();
        if (found->second.empty()) idle_.erase(found);
      }
    }
    if (block == nullptr) block = fresh(bytes);
    return {block, block, &Pool::release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    base_->copy_data(to, from, bytes);
  }

 private:
  // Storages remember this allocator, and may ask it for more memory at any time.
  bool used() {
    const std::lock_guard lock(mutex_);
    return users_ > 0;
  }

  void* fresh(size_t bytes) {
    void* block = nullptr;
    try {
      block = base_->raw_allocate(bytes);
    } catch (const std::exception&) {
      free_idle();
      block = base_->raw_allocate(bytes);
    }
    const std::lock_guard lock(mutex_);
    if (users_ > 0) sizes_[block] = bytes;
    return block;
  }

  // Also of a block that is not from here: oneDNN frees all of its memory by the allocator in use.
  static void release(void* block) {
    Pool& pool = get();
    {
      const std::lock_guard lock(pool.mutex_);
      const auto found = pool.sizes_.find(block);
      if (found != pool.sizes_.end()) {
        pool.idle_[found->second].push_back(block);
        return;
      }
    }
    pool.base_->raw_deallocate(block);
  }

  void free_idle() {
    Idle idle;
    {
      const std::lock_guard lock(mutex_);
      idle.swap(idle_);
      for (const auto& [bytes, blocks] : idle) {
        for (void* block : blocks) sizes_.erase(block);
      }
    }
    give_back(idle);
  }

  void give_back(const Idle& idle) {
    for (const auto& [bytes, blocks] : idle) {
      for (void* block : blocks) base_->raw_deallocate(block);
    }
  }

  std::mutex mutex_;
  int users_ = 0;
  c10::Allocator* base_ = nullptr;
  Idle idle_;
  std::unordered_map<void*, size_t> sizes_;  // of the blocks that were taken while it is used
};

}  // namespace

PYBIND11_MODULE(_memory, module) {
  module.doc() = "A pool for the memory of CPU tensors.";
  module.attr("torch") = LEAF_TORCH_VERSION;  // the version it was built with
  module.def(
      "enter", [] { Pool::get().enter(); }, "Uses the pool, until as many calls of leave().");
  module.def("leave", [] { Pool::get().leave(); }, "Frees what waits in the pool.");
}
