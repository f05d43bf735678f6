#pragma once

// What the parts of the emulation know of a running launch. One thread of the GPU runs at a time,
// on the CPU thread that launched, until it waits for others; so nothing here needs a lock.

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace leaf::emulation {

constexpr unsigned kWarp = 32;

enum class State { kReady, kAtBlockBarrier, kAtClusterBarrier, kAtWarp, kExited };

struct Block;

// A call of the emulation by a kernel.
struct Call {
  Where where;
  const void* code = nullptr;  // to which it returns
};

struct Thread {
  Thread(Block* block, unsigned index, void* stack) : block(block), index(index), stack(stack) {}

  Block* block;
  unsigned index;
  void* stack;
  State state = State::kReady;
  Call call;  // that waits, or the last one that did

  // In an operation of the warp: what it is, the own value and the lane whose value is wanted.
  Warp operation;
  unsigned mask;
  uint64_t value;
  unsigned source;
  uint64_t result;

  std::vector<Copy> copies;         // that it has not waited for
  bool arrived_in_cluster = false;  // and has not waited yet

  // What happened before what, for race.cpp: for each arrival in the cluster, whether it showed
  // others what this thread had written; how many such barriers it has left; how often each lane of
  // the warp is known to have synchronized.
  std::vector<bool> releases;
  size_t waits = 0;
  unsigned warp_clock[kWarp] = {};

  unsigned lane() const { return index % kWarp; }
};

// One bit a lane.
struct WarpState {
  unsigned waiting = 0;  // in an operation of the warp
  unsigned exited = 0;
};

struct Block {
  Block() = default;
  Block(unsigned rank, uint3 index) : rank(rank), index(index) {}

  unsigned rank;  // in its cluster
  uint3 index;
  std::vector<Thread> threads;
  std::vector<WarpState> warps;
  unsigned waiting = 0;  // at the block's barrier
  unsigned exited = 0;
  unsigned barriers = 0;  // that the block has passed
};

// The order in which what could run at once runs: LEAF_EMULATION_ORDER=forward|reverse|random,
// LEAF_EMULATION_SEED=number. In the fixed orders everything runs as far ahead of the others as
// barriers allow.
class Order {
 public:
  Order();
  std::vector<unsigned> of(unsigned count);
  bool pause();  // whether to look elsewhere before going on here

 private:
  enum { kForward, kReverse, kRandom } kind_ = kForward;
  std::minstd_rand random_;
};

// One launch, cluster by cluster.
class Launch {
 public:
  Launch(const void* kernel, dim3 grid, unsigned threads, unsigned blocks_in_cluster,
         size_t dynamic_bytes, const std::function<void()>& body);
  ~Launch();
  void run();

  // For the thread that runs.
  void sync_block(const Call& call);
  void arrive_in_cluster(bool releases, const Call& call);
  void wait_for_cluster(const Call& call);
  void wait(State state, const Call& call);

  const void* const kernel;
  const dim3 grid;
  const unsigned threads;
  const unsigned blocks_in_cluster;
  SharedMemory shared;
  std::vector<Block> cluster;  // that runs
  Thread* running = nullptr;

 private:
  static void thread_main();
  void exit_thread();
  void start_cluster(unsigned first_block);
  void run_cluster();
  bool run_block(Block& block);
  bool run_warp(Block& block, unsigned warp);
  void report_deadlock();

  const std::function<void()>& body_;
  Order order_;
  unsigned cluster_arrivals_ = 0;
  size_t cluster_barriers_ = 0;  // that have been passed
  void* scheduler_stack_ = nullptr;
};

// The stacks of all threads.
extern Stacks stacks;

// The launch that runs now, or null.
extern Launch* active;

// Says what is wrong, in which thread and in which call, and aborts.
void fail(const std::string& message);
void fail(const std::string& message, const Call& call);
std::string describe(const Thread& thread);
// Functions, files and lines of the call that returns to `code`, as far as debug information goes.
std::string describe(const void* code);
bool same_place(const Call& a, const Call& b);
std::string name_of(Warp operation);

// What race.cpp knows ends with a launch, and of shared memory with a cluster.
void forget_accesses();
void forget_shared_accesses();

}  // namespace leaf::emulation
