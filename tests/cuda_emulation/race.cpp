// Finds accesses to the same memory, one of them a write, that no barrier orders.
//
// Where kernels are compiled with -fsanitize=thread, the compiler puts a call of a function named
// __tsan_* before each access. These functions are here, and the sanitizer's own library is not
// linked: of barriers of a GPU it knows nothing. It does not matter in which order the threads of
// this run came: what counts is which barriers lay between two accesses.

#include <array>
#include <unordered_map>

#include "scheduler.h"

namespace leaf::emulation {
namespace {

struct Access {
  const void* code = nullptr;  // that made it; null: there was none
  unsigned block;
  unsigned thread;
  // What the thread had passed by then.
  unsigned barriers;
  size_t arrivals;
  unsigned warp_clock;
  bool atomic;
};

// What is remembered of a byte. Of its readers since the last write two are enough, as at least one
// of them is not the thread that writes next.
struct Byte {
  Access write;
  std::array<Access, 2> reads;
};

constexpr uintptr_t kGranule = 8;
using Memory = std::unordered_map<uintptr_t, std::array<Byte, kGranule>>;
Memory shared_memory;
Memory global_memory;

unsigned number_of(const Block& block) { return block.index.y * active->grid.x + block.index.x; }

Access access_by(const Thread& thread, const void* code, bool atomic) {
  return {code,
          number_of(*thread.block),
          thread.index,
          thread.block->barriers,
          thread.releases.size(),
          thread.warp_clock[thread.lane()],
          atomic};
}

// Whether an access was over before what the thread does now.
bool is_before(const Access& access, const Thread& now) {
  const unsigned blocks = active->blocks_in_cluster;
  const unsigned block = number_of(*now.block);
  if (access.block / blocks != block / blocks) return false;
  const Thread& earlier = active->cluster[access.block % blocks].threads[access.thread];
  for (size_t i = access.arrivals; i < now.waits; ++i) {
    if (earlier.releases[i]) return true;
  }
  if (access.block != block) return false;
  if (access.thread == now.index || access.barriers < now.block->barriers) return true;
  return access.thread / kWarp == now.index / kWarp &&
         access.warp_clock < now.warp_clock[access.thread % kWarp];
}

void check(const Access& earlier, const char* was, const Access& later, const char* is) {
  if (earlier.code == nullptr || (earlier.atomic && later.atomic)) return;
  if (is_before(earlier, *active->running)) return;
  fail(std::string("race: nothing orders a ") + is + " at" + describe(later.code) +
       "\n  and an earlier " + was + " by block " + std::to_string(earlier.block) + ", thread " +
       std::to_string(earlier.thread) + " at" + describe(earlier.code));
}

void note_read(Byte& byte, const Access& access) {
  check(byte.write, "write", access, "read");
  const bool again = byte.reads[0].code == nullptr || is_before(byte.reads[0], *active->running);
  byte.reads[again ? 0 : 1] = access;
}

void note_write(Byte& byte, const Access& access) {
  check(byte.write, "write", access, "write");
  for (const Access& read : byte.reads) check(read, "read", access, "write");
  byte = {access, {}};
}

void note(const void* address, size_t size, const void* code, bool is_write, bool atomic = false) {
  // Not of the host's code, and not of variables of this thread alone.
  if (!stacks.contain(__builtin_frame_address(0)) || stacks.contain(address)) return;
  bool dead = false;
  const void* shared = active->shared.canonical(address, &dead);
  if (dead) {
    fail("shared memory of a block that has not started or has ended is touched at" +
         describe(code));
  }
  Memory& memory = shared == nullptr ? global_memory : shared_memory;
  const auto begin = reinterpret_cast<uintptr_t>(shared == nullptr ? address : shared);
  const Access access = access_by(*active->running, code, atomic);
  for (uintptr_t i = begin; i < begin + size; ++i) {
    Byte& byte = memory[i / kGranule][i % kGranule];
    is_write ? note_write(byte, access) : note_read(byte, access);
  }
}

bool instrumented = false;

}  // namespace

void forget_accesses() { global_memory.clear(); }
void forget_shared_accesses() { shared_memory.clear(); }

void note_atomic(const void* address, size_t size) {
  if (instrumented) note(address, size, __builtin_return_address(0), true, true);
}

}  // namespace leaf::emulation

using leaf::emulation::note;

#define LEAF_CALLER __builtin_return_address(0)
#define LEAF_ACCESS(size)                                                                      \
  void __tsan_read##size(void* address) { note(address, size, LEAF_CALLER, false); }           \
  void __tsan_write##size(void* address) { note(address, size, LEAF_CALLER, true); }           \
  void __tsan_unaligned_read##size(void* address) { note(address, size, LEAF_CALLER, false); } \
  void __tsan_unaligned_write##size(void* address) { note(address, size, LEAF_CALLER, true); }

extern "C" {
void __tsan_init() { leaf::emulation::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
LEAF_ACCESS(1)
LEAF_ACCESS(2)
LEAF_ACCESS(4)
LEAF_ACCESS(8)
LEAF_ACCESS(16)
void __tsan_read_range(void* address, size_t size) { note(address, size, LEAF_CALLER, false); }
void __tsan_write_range(void* address, size_t size) { note(address, size, LEAF_CALLER, true); }
// Of the host code: whether a function's static variable is there.
char __tsan_atomic8_load(const char* address, int) { return *address; }
}
