// The simulated machine: threads on fibers, in warps, CTAs and clusters, and the operations that run beside them.
#pragma once

#include <launch.cuh>

#include <cstdarg>
#include <deque>
#include <memory>
#include <vector>

#include "fiber.hpp"

namespace fastlora::model {

struct Cta;
struct Cluster;
struct Store;
struct Thread;
struct Warp;
struct Warpgroup;

// xorshift64*: the same sequence everywhere.
struct Random {
  uint64_t state = 1;

  void seed(uint64_t seed) {
    state = (seed + 1) * 0x9E3779B97F4A7C15u;
    if (state == 0) state = 1;
    for (int i = 0; i < 8; ++i) next();
  }
  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545F4914F6CDD1Du >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(uint64_t(next()) * n >> 32); }
  bool percent(uint32_t share) { return below(100) < share; }
};

enum class Wait : uint8_t { NONE, BARRIER, SYNC, WARP, WGMMA, REGISTERS, SPIN };

using Threads = std::vector<Thread*>;

struct Barrier {
  Shared address;
  const char* name;
  int index;
  uint32_t arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  // Its initialisation is visible beyond the CTA's own threads.
  bool published = false;
  const Thread* initialiser;
  Threads waiters;
};

// What cta_sync, named_barrier_sync and cluster_sync wait at.
struct SyncPoint {
  const char* name;
  int index;
  uint32_t expected = 0, arrived = 0, generation = 0;
  Threads waiters;
};

// Words of a CTA's shared memory that a thread wrote and has not fenced.
struct Span {
  Cta* cta;
  uint32_t first, last;
};

// Sums of a warpgroup that are in flight: a matrix [64, n], until the threads wait.
struct Accumulator {
  int n;
  uint32_t restored = 0;
  alignas(32) float values[64 * 256];
};

struct LiveAccumulator {
  float* d;
  Accumulator* sums;
  uint64_t last;
};

struct Thread {
  Fiber fiber;
  Cta* cta;
  Warp* warp;
  uint32_t index, lane;
  bool exited;

  Wait wait;
  const void* object;
  uint32_t argument;

  std::vector<Span> unfenced;

  std::vector<Store*> stores;
  uint32_t stores_committed;

  // Counts since the thread began: the n-th wgmma of a thread is the n-th of its warpgroup.
  uint64_t wgmma_issued;
  std::deque<uint64_t> wgmma_groups;
  uint64_t wgmma_groups_done;
  bool wgmma_fenced;
  std::vector<LiveAccumulator> accumulators;
};

struct Warp {
  static constexpr uint32_t NOWHERE = ~0u;

  Cta* cta;
  uint32_t index;
  uint32_t runnable;
  uint32_t slot;
  bool slow;
  uint32_t registers;

  // The collective that lanes are gathering for: values of the last two stay, since a lane may go on to the next.
  const char* collective;
  uint32_t gathered, generation;
  uint32_t values[2][32];
  Shared addresses[32];
  Words4 words[32];
  Threads waiters;
};

// Something that goes on without a thread: in Grid::pending it is run at random times, a late one only when forced.
struct Operation {
  uint32_t slot = ~0u;
  bool late = false;

  virtual ~Operation() = default;
  // A step; true when nothing is left to do, and then it has been retired.
  virtual bool step() = 0;
  virtual void retire() { delete this; }
};

struct Load : Operation {
  Cta* cta;
  TensorMap map;
  Shared to, barrier;
  int32_t c0, c1;
  uint32_t first, last;

  bool step() override;
};

struct Store : Operation {
  Thread* owner;
  Cta* cta;
  TensorMap map;
  Shared from;
  int32_t c0, c1;
  uint32_t group;
  bool read = false, awaited = false;
  std::vector<uint8_t> data;

  void read_source();
  bool step() override;
};

struct Wgmma {
  WgmmaShape shape;
  uint64_t a, b;
  bool accumulate, early;
  uint64_t group;
  uint32_t issued;
  Accumulator* sums;
};

// The four warps that issue a wgmma together.
struct Warpgroup : Operation {
  Cta* cta;
  uint32_t index;
  std::deque<Wgmma> queue;
  uint64_t executed;
  std::vector<std::unique_ptr<Accumulator>> pool;
  std::vector<Accumulator*> spare;
  Threads waiters;

  bool step() override;
  void retire() override {}
};

struct Cta {
  Cluster* cluster;
  uint32_t rank, x, y;
  uint32_t live;
  std::vector<uint8_t> memory;
  // Of each word, who wrote it without a fence since; 0: nobody.
  std::vector<uint16_t> writers;
  uint32_t unfenced_words;
  std::deque<Barrier> barriers;
  std::vector<uint16_t> barrier_of;
  SyncPoint named[16];
  std::vector<Load*> loads;
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  std::deque<Warpgroup> warpgroups;
  uint32_t free_registers;
  Threads register_waiters;

  uint8_t* at(Shared address, uint32_t bytes, const char* user);
};

struct Cluster {
  std::vector<Cta*> ctas;
  uint32_t live;
  SyncPoint sync;
};

struct Settings {
  uint64_t seed = 0;
  uint32_t resident_clusters = 4;
  uint32_t calls_between_yields = 0;
  uint64_t most_steps = 50'000'000;
};

enum Statistic { LAUNCHES, STEPS, WGMMAS, LOADS, LOAD_BYTES, STORES, STORE_BYTES, BARRIER_PHASES, STATISTICS };

struct Grid {
  LaunchShape shape;
  Body body;
  Random random;
  Shared base;
  uint32_t leader;
  uint32_t async_percent;
  uint32_t yield_mean, calls_to_yield;

  std::vector<Warp*> runnable;
  std::vector<Operation*> pending, late;
  std::deque<Cluster> clusters;
  std::vector<Cluster*> finished;
  std::vector<uint32_t> order;
  uint32_t next = 0;
  uint64_t steps = 0, idle_spins = 0;
  bool waited_for_dependency = false;
  bool failed = false;

  ~Grid();
  void start_next_cluster();
  void end_cluster(Cluster& cluster);
  void run();
  void run_warp(Warp& warp);
  void run_pending();
  void add(Operation* operation);
  void remove(Operation* operation);
};

// Thrown where there is no fiber to abandon.
struct Failure {};

extern Grid* grid;
extern Thread* current;
extern Settings settings;
extern uint64_t statistics[STATISTICS];

// Ends the launch with a message. On a fiber: never resumed again.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
const char* failure_message();
[[noreturn]] void report_deadlock(const char* why);

// Suspends until woken. The caller looks again at what it waits for.
void block(Wait wait, const void* object, uint32_t argument, Threads& list);
void wake(Thread* thread);
void wake_all(Threads& list);
// A point where others may run. ``progress``: the caller changed something that a spinning thread may see.
void breathe(bool progress = true);
void yield();

// The last of a warp's lanes to come runs ``finish``; all return the generation whose values they may read.
uint32_t gather_warp(const char* name, uint32_t value, void (*finish)(Warp& warp) = nullptr);
void check_sync_points(Cta& cta);

Barrier& barrier_at(Cta& cta, Shared address, const char* user);
void complete_bytes(Cta& cta, Shared barrier, uint32_t bytes);
void check_not_barrier(Cta& cta, Shared address, uint32_t bytes, const char* user);

// Before the copy engine or wgmma looks at these bytes.
void check_fenced(Cta& cta, Shared address, uint32_t bytes, const char* user);
Cta& cta_of_cluster(uint32_t rank, const char* user);

void end_stores(Thread& thread);
void end_wgmmas(Thread& thread);

// The 128-byte swizzle: bits 7-9 of an absolute address onto bits 4-6.
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

}  // namespace fastlora::model
