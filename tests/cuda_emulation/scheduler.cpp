#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace leaf::emulation {

Launch* active = nullptr;
Stacks stacks;

Order::Order() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  const std::string order = variable("LEAF_EMULATION_ORDER");
  kind_ = order == "random" ? kRandom : order == "reverse" ? kReverse : kForward;
  random_.seed(static_cast<unsigned>(std::atoi(variable("LEAF_EMULATION_SEED").c_str())) + 1);
}

std::vector<unsigned> Order::of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (kind_ == kReverse) std::reverse(order.begin(), order.end());
  if (kind_ == kRandom) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

bool Order::pause() { return kind_ == kRandom && random_() % 3 == 0; }

bool Knowledge::has(const Moment& moment) const {
  if (moment.barriers < barriers[moment.rank]) return true;
  const auto found = clocks.find({moment.rank, moment.thread});
  return found != clocks.end() && moment.clock < found->second;
}

void Knowledge::add(const Knowledge& more) {
  for (unsigned i = 0; i < kMaxCluster; ++i) barriers[i] = std::max(barriers[i], more.barriers[i]);
  for (const auto& [who, clock] : more.clocks) clocks[who] = std::max(clocks[who], clock);
}

Moment Thread::now() const {
  return {block->rank, index, block->known.barriers[block->rank], clock};
}

bool Thread::knows(const Moment& moment) const {
  const bool own = moment.rank == block->rank && moment.thread == index;
  return own || block->known.has(moment) || known.has(moment);
}

void Thread::show() { known.clocks[{block->rank, index}] = ++clock; }

Launch::Launch(const void* kernel, dim3 grid, unsigned threads, unsigned blocks_in_cluster,
               size_t dynamic_bytes, const std::function<void()>& body)
    : kernel(kernel),
      grid(grid),
      threads(threads),
      blocks_in_cluster(blocks_in_cluster),
      shared(blocks_in_cluster, dynamic_bytes),
      cluster(blocks_in_cluster),
      body_(body) {
  stacks.reserve(static_cast<size_t>(blocks_in_cluster) * threads);
  forget_accesses();
  active = this;
  gridDim = grid;
  blockDim = dim3(threads);
}

Launch::~Launch() { active = nullptr; }

void Launch::run() {
  for (const unsigned i : order_.of(grid.x * grid.y / blocks_in_cluster)) {
    start_cluster(i * blocks_in_cluster);
    run_cluster();
  }
}

void Launch::start_cluster(unsigned first_block) {
  forget_shared_accesses();
  shared.start_cluster();
  cluster_barriers_ = cluster_arrivals_ = 0;
  for (unsigned rank = 0; rank < blocks_in_cluster; ++rank) {
    const unsigned block_number = first_block + rank;
    cluster[rank] = Block(rank, {block_number % grid.x, block_number / grid.x, 0});
    cluster[rank].warps.resize((threads + kWarp - 1) / kWarp);
    for (unsigned i = 0; i < threads; ++i) {
      const size_t stack = static_cast<size_t>(rank) * threads + i;
      cluster[rank].threads.emplace_back(&cluster[rank], i, stacks.start(stack, thread_main));
    }
  }
}

void Launch::run_cluster() {
  const auto done = [](const Block& block) { return block.exited == block.threads.size(); };
  while (!std::all_of(cluster.begin(), cluster.end(), done)) {
    bool progress = false;
    for (const unsigned rank : order_.of(blocks_in_cluster)) progress |= run_block(cluster[rank]);
    if (!progress) report_deadlock();
  }
}

bool Launch::run_block(Block& block) {
  const auto ready = [](const Thread& thread) { return thread.state == State::kReady; };
  if (std::none_of(block.threads.begin(), block.threads.end(), ready)) return false;
  shared.enter(block.rank);
  block.started = true;
  blockIdx = block.index;
  bool progress = true;
  while (progress) {
    progress = false;
    for (const unsigned warp : order_.of((threads + kWarp - 1) / kWarp)) {
      progress |= run_warp(block, warp);
    }
    if (order_.pause()) break;
  }
  return true;
}

bool Launch::run_warp(Block& block, unsigned warp) {
  bool any = false;
  bool progress = true;
  while (progress) {
    progress = false;
    for (const unsigned lane : order_.of(std::min(kWarp, threads - warp * kWarp))) {
      running = &block.threads[warp * kWarp + lane];
      if (running->state != State::kReady) continue;
      threadIdx = {running->index, 0, 0};
      leaf_switch_stacks(&scheduler_stack_, running->stack);
      any = progress = true;
    }
    if (order_.pause()) break;
  }
  running = nullptr;
  return any;
}

// The entry point of every thread, on its own stack.
void Launch::thread_main() {
  active->body_();
  active->exit_thread();
}

void Launch::exit_thread() {
  if (running->cluster_arrivals > running->cluster_waits) {
    fail("a thread exits, not waiting after it arrived");
  }
  if (++running->block->exited == threads) check_arrivals();
  running->block->warps[running->index / kWarp].exited |= 1u << running->lane();
  wait(State::kExited, running->call);
}

void Launch::wait(State state, const Call& call) {
  running->state = state;
  running->call = call;
  leaf_switch_stacks(&running->stack, scheduler_stack_);
}

void Launch::sync_block(const Call& call) {
  Block& block = *running->block;
  if (++block.waiting < threads) return wait(State::kAtBlockBarrier, call);
  block.waiting = 0;
  ++block.known.barriers[block.rank];
  for (Thread& thread : block.threads) {
    block.known.add(std::exchange(thread.known, {}));
    if (&thread == running) continue;
    if (!same_place(thread.call, call)) {
      fail("threads of a block meet at different barriers; one is at" + describe(thread.call.code) +
               "\n  the other",
           call);
    }
    thread.state = State::kReady;
  }
}

void Launch::arrive_in_cluster(const Call& call) {
  if (++running->cluster_arrivals > running->cluster_waits + 1) {
    fail("a thread arrives in its cluster twice", call);
  }
  running->call = call;
  if (++cluster_arrivals_ < threads * blocks_in_cluster) return;
  cluster_arrivals_ = 0;
  ++cluster_barriers_;
  for (Block& block : cluster) {
    for (Thread& thread : block.threads) {
      if (thread.state == State::kAtClusterBarrier) thread.state = State::kReady;
    }
  }
}

void Launch::wait_for_cluster(const Call& call) {
  if (running->cluster_arrivals == running->cluster_waits) {
    fail("a thread waits for its cluster, not arrived", call);
  }
  if (cluster_barriers_ < running->cluster_arrivals) wait(State::kAtClusterBarrier, call);
  ++running->cluster_waits;
}

namespace {

std::string what_it_does(const Thread& thread) {
  const std::string at = " at" + describe(thread.call.code);
  switch (thread.state) {
    case State::kAtBlockBarrier:
      return "wait in __syncthreads" + at;
    case State::kAtClusterBarrier:
      return "wait for the cluster" + at;
    case State::kAtWarp:
      return "wait in " + name_of(thread.operation) + at;
    case State::kAtArrivals:
      return "wait for bytes that arrive, " + std::to_string(thread.awaited->missing) +
             " are missing," + at;
    case State::kExited:
      return "have exited";
    default:
      return "are ready";
  }
}

}  // namespace

void Launch::report_deadlock() {
  std::string message = "deadlock:";
  for (const Block& block : cluster) {
    std::map<std::string, unsigned> groups;
    for (const Thread& thread : block.threads) ++groups[what_it_does(thread)];
    message += "\n  block " + std::to_string(block.index.x) + ":";
    for (const auto& [what, count] : groups) {
      message += "\n    " + std::to_string(count) + " threads " + what;
    }
  }
  running = nullptr;
  fail(message);
}

}  // namespace leaf::emulation
