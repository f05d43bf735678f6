// leaf_ext._memory: a pool for the memory of CPU tensors.
//
// A module of its own, because c10::Allocator is not part of torch's stable ABI: it is only used
// under the torch that it was built with.

#include <Python.h>
#include <c10/core/Allocator.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

// The gain is in the large blocks, and the lock would cost more in small ones.
constexpr size_t kLeast = size_t{1} << 15;

// In use, a block that is freed waits for the next tensor of its size. A C library would give parts
// of it to small objects that stay, and then has to take new memory for each tensor.
//
// From its first use on it is torch's allocator for the CPU, and passes everything on to the one
// before while it is not in use: torch's table of allocators is not meant to change often.
class Pool final : public c10::Allocator {
  using Idle = std::map<size_t, std::vector<void*>>;  // by size

 public:
  static Pool& get() {
    // Never freed: tensors may outlive the interpreter.
    static Pool* const pool = [] {
      static Pool* const made = new Pool;
      // A child of a process whose other thread held the lock could never take it.
      pthread_atfork([] { made->mutex_.lock(); }, [] { made->mutex_.unlock(); },
                     [] { made->mutex_.unlock(); });
      return made;
    }();
    return *pool;
  }

  void enter() {
    const std::lock_guard lock(mutex_);
    if (base_ == nullptr) {
      c10::Allocator* current = c10::GetAllocator(c10::kCPU);
      if (current->raw_deleter() != nullptr) {  // else its blocks are not known by their address
        base_ = current;
        std::atomic_thread_fence(std::memory_order_release);
        c10::SetAllocator(c10::kCPU, this);
      }
    }
    ++users_;
  }

  // Returns whether there was an enter() to this call.
  bool leave() {
    Idle idle;
    {
      const std::lock_guard lock(mutex_);
      if (users_ == 0) return false;
      if (--users_ > 0) return true;
      idle.swap(idle_);
      sizes_.clear();  // what is not idle goes back to the C library when it is freed
      idle_bytes_ = used_bytes_ = 0;
    }
    give_back(idle);
    return true;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (users_ == 0 || c10::memoryProfilingEnabled()) return base_->allocate(bytes);
    if (bytes < kLeast) {
      c10::DataPtr small = base_->allocate(bytes);
      const std::lock_guard lock(mutex_);
      forget(small.get());
      return small;
    }
    void* block = take(bytes);
    if (block == nullptr) block = fresh(bytes);
    return {block, block, &Pool::release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    base_->copy_data(to, from, bytes);
  }

 private:
  // Returns an idle block that is at most an eighth too large, or null.
  void* take(size_t bytes) {
    Idle idle;
    {
      const std::lock_guard lock(mutex_);
      const auto found = idle_.lower_bound(bytes);
      if (found != idle_.end() && found->first <= bytes + bytes / 8) {
        void* block = found->second.back();  // the last one is the likeliest to be in a cache
        idle_bytes_ -= found->first;
        used_bytes_ += found->first;
        found->second.pop_back();
        if (found->second.empty()) idle_.erase(found);
        return block;
      }
      // Sizes that never come again would fill the memory.
      if (idle_bytes_ > used_bytes_ / 4) idle = take_idle();
    }
    give_back(idle);
    return nullptr;
  }

  void* fresh(size_t bytes) {
    void* block = nullptr;
    try {
      block = base_->raw_allocate(bytes);
    } catch (const std::exception&) {
      Idle idle;
      {
        const std::lock_guard lock(mutex_);
        idle = take_idle();
      }
      give_back(idle);
      block = base_->raw_allocate(bytes);
    }
    const std::lock_guard lock(mutex_);
    if (users_ > 0) {
      forget(block);
      sizes_[block] = bytes;
      used_bytes_ += bytes;
    }
    return block;
  }

  // Also frees blocks that are not from here: small ones, those of an earlier use, and those that a
  // library took from the allocator before and frees by the one that it finds. All are its blocks.
  static void release(void* block) {
    Pool& pool = get();
    {
      const std::lock_guard lock(pool.mutex_);
      const auto found = pool.sizes_.find(block);
      if (found != pool.sizes_.end()) {
        const size_t bytes = found->second;
        try {
          pool.idle_[bytes].push_back(block);
          pool.idle_bytes_ += bytes;
          pool.used_bytes_ -= bytes;
          return;
        } catch (const std::bad_alloc&) {
          pool.forget(block);
        }
      }
    }
    pool.base_->raw_deallocate(block);
  }

  // An address that comes from the C library again has been freed behind our back.
  void forget(void* block) {
    const auto found = sizes_.find(block);
    if (found == sizes_.end()) return;
    used_bytes_ -= found->second;
    sizes_.erase(found);
  }

  Idle take_idle() {
    Idle idle;
    idle.swap(idle_);
    for (const auto& [bytes, blocks] : idle) {
      for (void* block : blocks) sizes_.erase(block);
    }
    idle_bytes_ = 0;
    return idle;
  }

  void give_back(const Idle& idle) {
    for (const auto& [bytes, blocks] : idle) {
      for (void* block : blocks) base_->raw_deallocate(block);
    }
  }

  std::mutex mutex_;
  std::atomic<int> users_ = 0;
  c10::Allocator* base_ = nullptr;           // the allocator before; set once
  std::unordered_map<void*, size_t> sizes_;  // of the blocks of this use, idle ones included
  Idle idle_;
  size_t idle_bytes_ = 0;
  size_t used_bytes_ = 0;
};

PyObject* enter(PyObject*, PyObject*) {
  Pool::get().enter();
  Py_RETURN_NONE;
}

PyObject* leave(PyObject*, PyObject*) {
  bool entered = false;
  Py_BEGIN_ALLOW_THREADS;
  entered = Pool::get().leave();
  Py_END_ALLOW_THREADS;
  if (entered) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, "leave() was called more often than enter()");
  return nullptr;
}

PyMethodDef methods[] = {
    {"enter", enter, METH_NOARGS, "Uses the pool, until as many calls of leave()."},
    {"leave", leave, METH_NOARGS, "Frees what waits in the pool."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_memory",
                          "A pool for the memory of CPU tensors.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__memory() {
  PyObject* module = PyModule_Create(&definition);
  // "torch" is the version it was built with.
  if (module != nullptr && PyModule_AddStringConstant(module, "torch", LEAF_TORCH_VERSION) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
