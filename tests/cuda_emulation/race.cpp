// Finds accesses to the same memory, one of them a write, that no barrier orders.
//
// In kernels compiled with -fsanitize=thread, the compiler calls a function __tsan_* before each
// access. These functions are defined here. The sanitizer's library is not linked, because it does
// not know a GPU's barriers. The order of the threads in this run does not matter: two accesses are
// ordered only by the barriers between them.

#include <algorithm>
#include <array>
#include <unordered_map>

#include "scheduler.h"

namespace leaf::emulation {
namespace {

struct Access {
  const void* code = nullptr;  // the code that made it; null if there was none
  unsigned block;              // its number in the grid
  Moment moment;
  bool atomic;
};

// The recorded accesses of a byte. Two of a block's readers since the last write suffice, because
// at least one of them is not the next writer or the thread that signals the next writer.
struct Byte {
  Access write;
  std::vector<Access> reads;
};

constexpr uintptr_t kGranule = 8;
using Memory = std::unordered_map<uintptr_t, std::array<Byte, kGranule>>;
std::array<Memory, kMaxCluster> shared_memory;  // by rank
Memory global_memory;

unsigned number_of(const Block& block) { return block.index.y * active->grid.x + block.index.x; }

Access access_now(const void* code, bool atomic) {
  const auto& arriving = active->arriving;
  const Moment moment = arriving ? arriving->moment : active->running->now();
  return {arriving ? arriving->call.code : code, number_of(active->cluster[moment.rank]), moment,
          atomic};
}

// Returns whether an access is ordered before the present one.
bool is_before(const Access& access) {
  const unsigned blocks = active->blocks_in_cluster;
  const Block& block = *active->running->block;
  if (access.block / blocks != number_of(block) / blocks) return false;
  if (!active->arriving) return active->running->knows(access.moment);
  const Moment& now = active->arriving->moment;
  const Moment& earlier = access.moment;
  const bool same = now.rank == earlier.rank && now.thread == earlier.thread;
  return same ? now.clock == earlier.clock : active->arriving->known.has(earlier);
}

std::string by(const Access& access) {
  const std::string block = "block " + std::to_string(access.block);
  const unsigned thread = access.moment.thread;
  return thread < active->threads ? " by " + block + ", thread " + std::to_string(thread) + " at"
                                  : " by bytes on their way to " + block + " from";
}

void check(const Access& earlier, const char* was, const Access& later, const char* is) {
  if (earlier.code == nullptr || (earlier.atomic && later.atomic)) return;
  if (is_before(earlier)) return;
  fail(std::string("race: nothing orders a ") + is + by(later) + describe(later.code) +
       "\n  and an earlier " + was + by(earlier) + describe(earlier.code));
}

void note_read(Byte& byte, const Access& access) {
  check(byte.write, "write", access, "read");
  // Waiting for a copy does not order the accesses before the copy.
  if (!active->arriving) std::erase_if(byte.reads, is_before);
  const auto of_block = [&](const Access& read) { return read.block == access.block; };
  if (std::count_if(byte.reads.begin(), byte.reads.end(), of_block) < 2) {
    byte.reads.push_back(access);
  } else {
    *std::find_if(byte.reads.rbegin(), byte.reads.rend(), of_block) = access;
  }
}

void note_write(Byte& byte, const Access& access) {
  check(byte.write, "write", access, "write");
  for (const Access& read : byte.reads) check(read, "read", access, "write");
  byte = {access, {}};
}

void note(const void* address, size_t size, const void* code, bool is_write, bool atomic = false) {
  // Accesses of host code and of a thread's own variables are ignored.
  if (!stacks.contain(__builtin_frame_address(0)) || stacks.contain(address)) return;
  const bool shared = active->shared.contains(address);
  Memory& memory = shared ? shared_memory[active->running->block->rank] : global_memory;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Access access = access_now(code, atomic);
  for (uintptr_t i = begin; i < begin + size; ++i) {
    Byte& byte = memory[i / kGranule][i % kGranule];
    is_write ? note_write(byte, access) : note_read(byte, access);
  }
}

bool instrumented = false;

}  // namespace

void forget_accesses() { global_memory.clear(); }
void forget_shared_accesses() { shared_memory = {}; }

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
// Called by host code for static variables of functions.
char __tsan_atomic8_load(const char* address, int) { return *address; }
}
