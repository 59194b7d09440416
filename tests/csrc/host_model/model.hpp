// What runs the simulated machine, and what its parts call of each other.
#pragma once

#include "machine.hpp"

namespace fastlora::model {

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

struct Settings {
  uint64_t seed = 0;
  uint32_t resident_clusters = 4;
  uint32_t calls_between_yields = 0;
  uint64_t most_steps = 50'000'000;
};

// A launch and the dependent ones after it, of which each may start when the one before lets it.
struct Chain {
  // Memory that a launch writes for those after it.
  struct HandOver {
    int launch;
    const uint8_t *first, *last;
  };

  int launch = 0;
  // The last launch that had ended, its memory visible, before this one started.
  int ended = -1;
  // This one let the next start before it had itself waited.
  bool lets_go_early = false;
  std::vector<HandOver> memory;

  void start(bool dependent);
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
  uint64_t steps = 0, calls = 0, idle_spins = 0;
  bool waited_for_dependency = false;
  bool failed = false;

  ~Grid();
  void start_next_cluster();
  void run();
  void run_warp(Warp& warp);
  bool all_spin() const;
  void run_pending();
  void add(Operation* operation);
  void remove(Operation* operation);
};

// Thrown where there is no fiber to abandon.
struct Failure {};

extern Grid* grid;
extern Thread* current;
extern Settings settings;
extern Chain chain;
extern uint64_t statistics[STATISTICS];

// Ends the launch with a message. On a fiber: never resumed again.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
const char* failure_message();
[[noreturn]] void report_deadlock(const char* why);

// From a pool, with its threads ready to run; and back, whether they have ended or not.
Cta* start_cta(Cluster& cluster, uint32_t rank, uint32_t x, uint32_t y);
void end_cta(Cta* cta);

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

// Before these bytes are written: nothing in flight writes or reads them. Before they are read: nothing writes them.
void check_writable(Cta& cta, Shared address, uint32_t bytes, const char* user);
void check_readable(Cta& cta, Shared address, uint32_t bytes, const char* user);
// Before the copy engine or wgmma looks at them.
void check_fenced(Cta& cta, Shared address, uint32_t bytes, const char* user);
// Before memory of a launch before is read or counted in: this cluster has waited for that launch.
void check_handed_over(const void* first, size_t bytes, const char* user);
Cta& cta_of_cluster(uint32_t rank, const char* user);

void end_stores(Thread& thread);
void end_wgmmas(Thread& thread);

}  // namespace fastlora::model
