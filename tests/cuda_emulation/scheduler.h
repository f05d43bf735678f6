#pragma once

// What the parts of the emulation know of a running launch. One thread of the GPU runs at a time,
// on the CPU thread that launched, until it waits for others; so nothing here needs a lock.

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
  const void* code = nullptr;  // to which it returns
};

// Who did something, and when: after so many barriers of the block, and after the thread had shown
// so many times what it had done. Bytes on their way have numbers beyond those of threads, one for
// each Arrivals; their clock counts them, and barriers say nothing of them.
struct Moment {
  unsigned rank;
  unsigned thread;
  unsigned barriers;
  unsigned clock;
};

// What is known to be over: what lies before so many barriers of a block, and before a thread's
// clock said so much.
struct Knowledge {
  std::array<unsigned, kMaxCluster> barriers{};              // by rank
  std::map<std::pair<unsigned, unsigned>, unsigned> clocks;  // by rank and thread

  bool has(const Moment& moment) const;
  void add(const Knowledge& more);
};

// A transfer that has been asked for and is not over.
struct UnderWay {
  Transfer transfer;
  Call call;
  Moment moment;
  Knowledge known;  // to who asked
};

// What a block expects at one of its Arrivals.
struct Arrivals {
  unsigned number;            // of its bytes, among threads
  Moment expected;            // when it was said,
  unsigned cluster_arrivals;  // by a thread that had arrived so often in its cluster
  unsigned missing;           // bytes that are not under way
  unsigned transfers = 0;
  std::vector<UnderWay> under_way = {};
  Knowledge known = {};  // to who waits
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
  unsigned value;
  unsigned source;
  unsigned result;

  Arrivals* awaited = nullptr;
  unsigned cluster_arrivals = 0;
  unsigned cluster_waits = 0;

  Knowledge known;  // besides its block's
  unsigned clock = 0;

  unsigned lane() const { return index % kWarp; }
  Moment now() const;
  bool knows(const Moment& moment) const;
  void show();  // adds to `known` what it has done; others get that
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
  bool started = false;
  Knowledge known;                           // since its last barrier, to all its threads
  std::map<const void*, Arrivals> arrivals;  // by address
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
  void arrive_in_cluster(const Call& call);
  void wait_for_cluster(const Call& call);
  void wait(State state, const Call& call);

  const void* const kernel;
  const dim3 grid;
  const unsigned threads;
  const unsigned blocks_in_cluster;
  SharedMemory shared;
  std::vector<Block> cluster;  // that runs
  Thread* running = nullptr;
  std::optional<UnderWay> arriving;  // what the thread that runs writes, instead of its own

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
  unsigned cluster_barriers_ = 0;  // that have been passed
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

// Of the block of the thread that runs, which ends.
void check_arrivals();

// What race.cpp knows ends with a launch, and of shared memory with a cluster.
void forget_accesses();
void forget_shared_accesses();

}  // namespace leaf::emulation
