// The state of the simulated machine: threads in warps, CTAs and clusters, and the operations that run beside them.
#pragma once

#include <launch.cuh>

#include <deque>
#include <memory>
#include <vector>

#include "fiber.hpp"
#include "operand.hpp"

namespace fastlora::model {

struct Cta;
struct Cluster;
struct Store;
struct Thread;
struct Warp;
struct Warpgroup;

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

  // For the report of a deadlock.
  Wait wait;
  const void* object;
  uint32_t argument;

  std::vector<Span> unfenced;
  // What load_acquire saw last.
  const uint32_t* polled;
  uint32_t polled_value;

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

// A word for another CTA; 0xFFFFFFFF until it lands.
struct Word : Operation {
  Cta* cta;
  Shared to, barrier;
  uint32_t value;

  bool step() override;
};

// Lives until it has written what it read and its thread has waited for that.
struct Store : Operation {
  Thread* owner;
  Cta* cta;
  TensorMap map;
  Shared from;
  int32_t c0, c1;
  uint32_t group;
  bool read = false, awaited = false, written = false;
  std::vector<uint8_t> data;

  void read_source();
  bool step() override;
};

struct Wgmma {
  WgmmaShape shape;
  uint64_t a_bits, b_bits;
  Operand a, b;
  bool accumulate, early;
  uint64_t group;
  uint32_t issued;
  Accumulator* sums;
};

// The four warps that issue a wgmma together. In the queue: those from ``first`` on, which have not been executed or
// which no thread has waited for.
struct Warpgroup : Operation {
  Cta* cta;
  uint32_t index;
  std::deque<Wgmma> queue;
  uint64_t first, executed, awaited;
  std::vector<std::unique_ptr<Accumulator>> pool;
  std::vector<Accumulator*> spare;
  Threads waiters;

  bool may_execute() const { return executed < first + queue.size() && queue[executed - first].issued == 4 * 32; }
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
  // In flight; and those whose source nobody has waited to be read.
  std::vector<Load*> loads;
  std::vector<Store*> stores;
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
  // For the launch before.
  bool waited;
  SyncPoint sync;
};

}  // namespace fastlora::model
