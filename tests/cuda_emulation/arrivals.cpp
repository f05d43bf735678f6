// Bytes that arrive in a block's shared memory from copies and other blocks. They arrive as late as
// possible: when all have been sent and a thread waits for them.

#include <limits>

#include "scheduler.h"

namespace leaf::emulation {
namespace {

constexpr unsigned kAlways = std::numeric_limits<unsigned>::max();

void check_multiple(const void* address, size_t of, const Call& call) {
  if (reinterpret_cast<uintptr_t>(address) % of == 0) return;
  fail("an address is no multiple of " + std::to_string(of), call);
}

void check_shared(const void* address, size_t alignment, const Call& call) {
  if (!active->shared.contains(address)) fail("bytes go to what is not shared memory", call);
  check_multiple(address, alignment, call);
}

Arrivals& find(Block& block, const void* address, const Call& call) {
  const auto found = block.arrivals.find(address);
  if (found == block.arrivals.end()) fail("nobody has called expect on these Arrivals", call);
  const Arrivals& arrivals = found->second;
  const Thread& thread = *active->running;
  if (!thread.knows(arrivals.expected) && thread.cluster_waits <= arrivals.cluster_arrivals) {
    fail("nothing orders the call of expect on these Arrivals before", call);
  }
  return found->second;
}

void start(Arrivals& arrivals, const Transfer& transfer, bool shows, const Call& call) {
  const unsigned bytes = 16 * transfer.words;
  if (bytes > arrivals.missing) fail("more bytes are on their way than are expected", call);
  arrivals.missing -= bytes;
  Thread& thread = *active->running;
  thread.show();
  Knowledge known = thread.block->known;
  known.add(thread.known);
  if (shows) arrivals.known.add(known);
  const Moment moment{arrivals.expected.rank, arrivals.number, kAlways, arrivals.transfers++};
  arrivals.under_way.push_back({transfer, call, moment, std::move(known)});
  if (arrivals.missing > 0) return;
  for (Thread& other : active->cluster[arrivals.expected.rank].threads) {
    const bool waits = other.state == State::kAtArrivals && other.awaited == &arrivals;
    if (waits) other.state = State::kReady;
  }
}

}  // namespace

void note_expected(const void* address, unsigned bytes) {
  const Call call{{}, __builtin_return_address(0)};
  check_shared(address, sizeof(uint64_t), call);
  const Thread& thread = *active->running;
  Block& block = *thread.block;
  if (block.arrivals.contains(address)) fail("expect is called twice on these Arrivals", call);
  const auto number = active->threads + static_cast<unsigned>(block.arrivals.size());
  Arrivals& arrivals = block.arrivals[address];
  arrivals = {number, thread.now(), thread.cluster_arrivals, bytes};
  arrivals.known.clocks[{block.rank, number}] = kAlways;
}

void copy(char* shared, const char* global, unsigned bytes, void* address) {
  const Call call{{}, __builtin_return_address(0)};
  if (bytes % 16 != 0) fail("a copy of " + std::to_string(bytes) + " bytes, not of 16s", call);
  check_shared(shared, 16, call);
  check_multiple(global, 16, call);
  const auto* from = reinterpret_cast<const uint4*>(global);
  // A waiting thread sees the bytes, and not the earlier accesses of this thread.
  start(find(*active->running->block, address, call),
        {reinterpret_cast<uint4*>(shared), from, bytes / 16, {}}, false, call);
}

void send(uint4* to, uint4 value, void* address, int rank) {
  const Call call{{}, __builtin_return_address(0)};
  if (rank < 0 || static_cast<unsigned>(rank) >= active->blocks_in_cluster) {
    fail("there is no block " + std::to_string(rank) + " in a cluster of " +
             std::to_string(active->blocks_in_cluster),
         call);
  }
  check_shared(to, 16, call);
  Block& block = active->cluster[static_cast<unsigned>(rank)];
  if (!block.started) fail("bytes are sent to a block that has not started", call);
  if (block.exited == active->threads) fail("bytes are sent to a block that has ended", call);
  start(find(block, address, call), {to, nullptr, 1, value}, true, call);
}

void wait_for_bytes(const void* address) {
  const Call call{{}, __builtin_return_address(0)};
  Thread& thread = *active->running;
  Arrivals& arrivals = find(*thread.block, address, call);
  thread.awaited = &arrivals;
  if (arrivals.missing > 0) active->wait(State::kAtArrivals, call);
}

bool next_transfer(Transfer* transfer) {
  Thread& thread = *active->running;
  Arrivals& arrivals = *thread.awaited;
  active->arriving.reset();
  if (arrivals.under_way.empty()) {
    thread.known.add(arrivals.known);
    return false;
  }
  active->arriving = std::move(arrivals.under_way.back());
  arrivals.under_way.pop_back();
  *transfer = active->arriving->transfer;
  return true;
}

void check_arrivals() {
  for (const auto& [address, arrivals] : active->running->block->arrivals) {
    if (arrivals.missing > 0) fail("a block ends, and bytes that it expects are not on their way");
    if (!arrivals.under_way.empty()) fail("a block ends that has not waited for bytes");
  }
}

}  // namespace leaf::emulation
