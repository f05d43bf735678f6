// Operations of the 32 threads of a warp.

#include <algorithm>
#include <bit>
#include <cstdio>

#include "scheduler.h"

namespace leaf::emulation {
namespace {

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

void check_mask(const Thread& thread, unsigned present, unsigned exited) {
  const unsigned mask = thread.mask;
  const auto lane = [&] { return "lane " + std::to_string(thread.lane()); };
  if ((mask >> thread.lane() & 1) == 0) {
    fail("the mask " + hex(mask) + " lacks " + lane() + ", which calls", thread.call);
  }
  if (thread.operation == Warp::kShuffle && (mask >> thread.source & 1) == 0) {
    fail(lane() + " reads lane " + std::to_string(thread.source) + ", which the mask " + hex(mask) +
             " lacks",
         thread.call);
  }
  if (const unsigned missing = mask & (~present | exited); missing != 0) {
    const int first = std::countr_zero(missing);
    fail("the mask " + hex(mask) + " names lane " + std::to_string(first) +
             ((present >> first & 1) != 0 ? ", which has exited"
                                          : ", which the block does not have"),
         thread.call);
  }
}

bool meets(const Thread& thread, const Thread& other) {
  return other.state == State::kAtWarp && other.operation == thread.operation &&
         other.mask == thread.mask && same_place(other.call, thread.call);
}

// Gives each lane its result when all lanes of the mask have arrived.
void complete(const Thread& thread, Thread* warp) {
  unsigned ballot = 0;
  unsigned least = thread.value;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread.mask >> lane & 1) == 0) continue;
    least = std::min(least, warp[lane].value);
    if (warp[lane].value != 0) ballot |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread.mask >> lane & 1) == 0) continue;
    Thread& member = warp[lane];
    if (member.operation == Warp::kShuffle) member.result = warp[member.source].value;
    if (member.operation == Warp::kBallot) member.result = ballot;
    if (member.operation == Warp::kMin) member.result = least;
    member.state = State::kReady;
  }
}

// Only __syncwarp orders memory; a shuffle does not.
void order_memory(unsigned mask, Thread* warp) {
  Knowledge known;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    warp[lane].show();
    known.add(warp[lane].known);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) warp[lane].known = known;
  }
}

}  // namespace

std::string name_of(Warp operation) {
  constexpr const char* kNames[] = {"__syncwarp", "__shfl_sync", "__ballot_sync",
                                    "__reduce_min_sync"};
  return kNames[static_cast<int>(operation)];
}

unsigned sync_warp(Warp operation, unsigned mask, unsigned value, int lane, Where where) {
  Thread& thread = *active->running;
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = static_cast<unsigned>(lane) % kWarp;
  thread.call = {where, __builtin_return_address(0)};
  const unsigned first = thread.index - thread.lane();
  const unsigned lanes = std::min(kWarp, active->threads - first);
  const unsigned present = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  Thread* warp = &thread.block->threads[first];
  WarpState& state = thread.block->warps[first / kWarp];
  check_mask(thread, present, state.exited);
  thread.state = State::kAtWarp;
  state.waiting |= 1u << thread.lane();
  bool complete_now = (mask & ~state.waiting) == 0;
  for (unsigned i = 0; complete_now && i < lanes; ++i) {
    if ((mask >> i & 1) != 0) complete_now = meets(thread, warp[i]);
  }
  if (complete_now) {
    if (operation == Warp::kSync) order_memory(mask, warp);
    complete(thread, warp);
    state.waiting &= ~mask;
  } else {
    active->wait(State::kAtWarp, thread.call);
  }
  return thread.result;
}

}  // namespace leaf::emulation
