#pragma once

// The state of a running launch, which the parts of the emulation share. One thread of the GPU runs
// at a time, on the CPU thread that launched it, until it waits for others. No lock is needed.

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace leaf::emulation {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxCluster = 16;

enum class State { kReady, kAtBlockBarrier, kAtClusterBarrier, kAtWarp, kAtArrivals, kExited };

struct Block;

// A call of the emulation by a kernel.
struct Call {
  Where where;
  const void* code = nullptr;  // the return address
};

// The author and time of an access: the number of barriers of its block before it, and the thread's
// clock, which counts how often the thread has published its accesses. Bytes in flight have numbers
// beyond those of threads, one for each Arrivals. Their clock counts them; barriers do not order
// them.
struct Moment {
  unsigned rank;
  unsigned thread;
  unsigned barriers;
  unsigned clock;
};

// The accesses known to be over: those before a number of barriers of a block, and those before a
// time of a thread's clock.
struct Knowledge {
  std::array<unsigned, kMaxCluster> barriers{};              // by rank
  std::map<std::pair<unsigned, unsigned>, unsigned> clocks;  // by rank and thread

  bool has(const Moment& moment) const;
  void add(const Knowledge& more);
};

// A transfer that has been requested and is not over.
struct UnderWay {
  Transfer transfer;
  Call call;
  Moment moment;
  Knowledge known;  // of the thread that requested it
};

// The state of one of a block's Arrivals.
struct Arrivals {
  unsigned number;            // of its bytes, in the numbering of threads
  Moment expected;            // the time of `expect`
  unsigned cluster_arrivals;  // arrivals at cluster barriers before `expect`
  unsigned missing;           // bytes that have not been sent
  unsigned transfers = 0;
  std::vector<UnderWay> under_way = {};
  Knowledge known = {};  // of the threads that wait
};

struct Thread {
  Thread(Block* block, unsigned index, void* stack) : block(block), index(index), stack(stack) {}

  Block* block;
  unsigned index;
  void* stack;
  State state = State::kReady;
  Call call;  // the call that waits, or the last one that did

  // In an operation of the warp: its kind, this thread's value and the lane whose value it needs.
  Warp operation;
  unsigned mask;
  unsigned value;
  unsigned source;
  unsigned result;

  Arrivals* awaited = nullptr;
  unsigned cluster_arrivals = 0;
  unsigned cluster_waits = 0;

  Knowledge known;  // in addition to its block's
  unsigned clock = 0;

  unsigned lane() const { return index % kWarp; }
  Moment now() const;
  bool knows(const Moment& moment) const;
  void show();  // publishes its accesses in `known`, which others receive
};

// One bit for each lane.
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
  bool started = false;
  Knowledge known;                           // of all its threads since the last barrier
  std::map<const void*, Arrivals> arrivals;  // by address
};

// The order of threads that are ready to run: LEAF_EMULATION_ORDER=forward|reverse|random,
// LEAF_EMULATION_SEED=number. In the fixed orders each runs as far ahead of the others as barriers
// allow.
class Order {
 public:
  Order();
  std::vector<unsigned> of(unsigned count);
  bool pause();  // returns whether another thread should run first

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

  // Called by the running thread.
  void sync_block(const Call& call);
  void arrive_in_cluster(const Call& call);
  void wait_for_cluster(const Call& call);
  void wait(State state, const Call& call);

  const void* const kernel;
  const dim3 grid;
  const unsigned threads;
  const unsigned blocks_in_cluster;
  SharedMemory shared;
  std::vector<Block> cluster;  // the running one
  Thread* running = nullptr;
  std::optional<UnderWay> arriving;  // the transfer whose bytes the running thread writes

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
  unsigned cluster_barriers_ = 0;  // barriers that have been passed
  void* scheduler_stack_ = nullptr;
};

// The stacks of all threads.
extern Stacks stacks;

// The running launch, or null.
extern Launch* active;

// Reports an error with its thread and call, and aborts.
void fail(const std::string& message);
void fail(const std::string& message, const Call& call);
std::string describe(const Thread& thread);
// Returns functions, files and lines of the call that returns to `code`, from debug information.
std::string describe(const void* code);
bool same_place(const Call& a, const Call& b);
std::string name_of(Warp operation);

// Called at the end of the running thread's block.
void check_arrivals();

// Clears the records of race.cpp: all after a launch, those of shared memory after a cluster.
void forget_accesses();
void forget_shared_accesses();

}  // namespace leaf::emulation
