// What the 32 threads of a warp do together.

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

// The lane from which a shuffle takes its value: its own where the wanted one is outside the
// section of `width` lanes.
unsigned source_lane(Warp operation, unsigned lane, int operand, int width) {
  const int own = static_cast<int>(lane);
  const int first = own / width * width;
  int source = own;
  if (operation == Warp::kIndex) source = first + (operand & (width - 1));
  if (operation == Warp::kXor) source = own ^ operand;
  if (operation == Warp::kUp) source = own - operand;
  if (operation == Warp::kDown) source = own + operand;
  const bool below = operation == Warp::kUp && source < first;
  const bool above = operation != Warp::kUp && source >= first + width;
  return static_cast<unsigned>(below || above ? own : source);
}

bool is_shuffle(Warp operation) {
  return operation == Warp::kIndex || operation == Warp::kXor || operation == Warp::kUp ||
         operation == Warp::kDown;
}

void check_mask(const Thread& thread, unsigned present, unsigned exited) {
  const unsigned mask = thread.mask;
  const auto lane = [&] { return "lane " + std::to_string(thread.lane()); };
  if ((mask >> thread.lane() & 1) == 0) {
    fail("the mask " + hex(mask) + " lacks " + lane() + ", which calls", thread.call);
  }
  if (is_shuffle(thread.operation) && (mask >> thread.source & 1) == 0) {
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

// All lanes of the mask are there: gives each its result.
void complete(const Thread& thread, Thread* warp) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread.mask >> lane & 1) != 0 && warp[lane].value != 0) ballot |= 1u << lane;
  }
  const Warp operation = thread.operation;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread.mask >> lane & 1) == 0) continue;
    Thread& member = warp[lane];
    if (is_shuffle(operation)) member.result = warp[member.source].value;
    if (operation == Warp::kBallot) member.result = ballot;
    if (operation == Warp::kAny) member.result = ballot != 0;
    if (operation == Warp::kAll) member.result = ballot == thread.mask;
    member.state = State::kReady;
  }
}

// Only __syncwarp orders memory; what a shuffle hands over says nothing of it.
void order_memory(unsigned mask, Thread* warp) {
  unsigned known[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    ++warp[lane].warp_clock[lane];
    for (unsigned i = 0; i < kWarp; ++i) known[i] = std::max(known[i], warp[lane].warp_clock[i]);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) std::copy(known, known + kWarp, warp[lane].warp_clock);
  }
}

}  // namespace

std::string name_of(Warp operation) {
  constexpr const char* kNames[] = {"__syncwarp",     "__shfl_sync",      "__shfl_xor_sync",
                                    "__shfl_up_sync", "__shfl_down_sync", "__ballot_sync",
                                    "__any_sync",     "__all_sync"};
  return kNames[static_cast<int>(operation)];
}

uint64_t sync_warp(Warp operation, unsigned mask, uint64_t value, int operand, int width,
                   Where where) {
  Thread& thread = *active->running;
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = source_lane(operation, thread.lane(), operand, width);
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
  for (unsigned lane = 0; complete_now && lane < lanes; ++lane) {
    if ((mask >> lane & 1) != 0) complete_now = meets(thread, warp[lane]);
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
