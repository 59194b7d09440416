// Who a thread is, how threads wait for each other, and the registers of a warpgroup.
#include "model.hpp"

namespace fastlora {

namespace model {

void yield() { current->fiber.suspend(); }

void breathe(bool progress) {
  if (progress) {
    grid->idle_spins = 0;
    current->wait = Wait::NONE;
  }
  if (--grid->calls_to_yield == 0) {
    grid->calls_to_yield = 1 + grid->random.below(2 * grid->yield_mean);
    // A loop that polls without backing off makes calls and few steps.
    grid->calls += grid->calls_to_yield;
    if (grid->calls > 40 * settings.most_steps) fail("no end after the most calls that the settings allow");
    yield();
  }
}

void block(Wait wait, const void* object, uint32_t argument, Threads& list) {
  Thread& thread = *current;
  thread.wait = wait;
  thread.object = object;
  thread.argument = argument;
  thread.warp->runnable &= ~(1u << thread.lane);
  list.push_back(&thread);
  thread.fiber.suspend();
  thread.wait = Wait::NONE;
}

void wake(Thread* thread) {
  Warp& warp = *thread->warp;
  warp.runnable |= 1u << thread->lane;
  if (warp.slot == Warp::NOWHERE) {
    warp.slot = static_cast<uint32_t>(grid->runnable.size());
    grid->runnable.push_back(&warp);
  }
}

void wake_all(Threads& list) {
  for (Thread* thread : list) wake(thread);
  list.clear();
}

uint32_t gather_warp(const char* name, uint32_t value, void (*finish)(Warp& warp)) {
  Warp& warp = *current->warp;
  if (warp.gathered != 0 && warp.collective != name) {
    fail("calls %s while other lanes of its warp are at %s", name, warp.collective);
  }
  warp.collective = name;
  const uint32_t generation = warp.generation;
  warp.values[generation & 1][current->lane] = value;
  if (++warp.gathered == 32) {
    warp.gathered = 0;
    ++warp.generation;
    if (finish != nullptr) finish(warp);
    wake_all(warp.waiters);
  } else {
    while (warp.generation == generation) block(Wait::WARP, &warp, 0, warp.waiters);
  }
  return generation & 1;
}

namespace {

void release(SyncPoint& point) {
  point.arrived = 0;
  ++point.generation;
  wake_all(point.waiters);
}

void arrive_and_wait(SyncPoint& point, uint32_t expected) {
  if (point.arrived != 0 && point.expected != expected) {
    fail("comes to %s %d for %u threads, others for %u", point.name, point.index, expected, point.expected);
  }
  point.expected = expected;
  const uint32_t generation = point.generation;
  if (++point.arrived >= expected) {
    release(point);
  } else {
    while (point.generation == generation) block(Wait::SYNC, &point, 0, point.waiters);
  }
}

}  // namespace

// Threads that have exited count as arrived.
void check_sync_points(Cta& cta) {
  const auto check = [](SyncPoint& point, uint32_t live) {
    if (point.arrived == 0) return;
    point.expected = live;
    if (point.arrived >= live) release(point);
  };
  check(cta.named[0], cta.live);
  check(cta.cluster->sync, cta.cluster->live);
}

void set_registers(uint32_t registers, bool increase) {
  if (registers % 8 != 0 || registers < 24 || registers > 256) {
    fail("setmaxnreg of %u: not a multiple of 8 in 24 .. 256", registers);
  }
  Warp& warp = *current->warp;
  gather_warp(increase ? "registers_increase" : "registers_decrease", registers);
  // One lane settles for all.
  if (current->lane == 0) {
    Cta& cta = *warp.cta;
    if (increase ? registers < warp.registers : registers > warp.registers) {
      fail("registers_%s from %u to %u", increase ? "increase" : "decrease", warp.registers, registers);
    }
    if (increase) {
      while (cta.free_registers < 32 * (registers - warp.registers)) {
        block(Wait::REGISTERS, &warp, registers, cta.register_waiters);
      }
      cta.free_registers -= 32 * (registers - warp.registers);
    } else {
      cta.free_registers += 32 * (warp.registers - registers);
      wake_all(cta.register_waiters);
    }
    warp.registers = registers;
  }
  gather_warp("setmaxnreg", 0);
}

}  // namespace model

using namespace model;

uint32_t thread_index() { return current->index; }

uint32_t warp_index() {
  gather_warp("warp_index", 0);
  return current->warp->index;
}

uint32_t block_index() { return current->cta->x; }
uint32_t block_index_y() { return current->cta->y; }
uint32_t grid_blocks() { return grid->shape.blocks_x; }
uint32_t grid_blocks_y() { return grid->shape.blocks_y; }
uint32_t cluster_rank() { return current->cta->rank; }

// The manual promises the same lane every time, not which.
bool elect_one() {
  gather_warp("elect_one", 0);
  return current->lane == grid->leader;
}

void cta_sync() {
  arrive_and_wait(current->cta->named[0], current->cta->live);
  breathe(false);
}

void named_barrier_sync(uint32_t id, uint32_t threads) {
  if (id > 15) fail("named_barrier_sync %u: there are 16", id);
  if (threads == 0 || threads % 32 != 0 || threads > grid->shape.threads) {
    fail("named_barrier_sync %u for %u threads of %u", id, threads, grid->shape.threads);
  }
  arrive_and_wait(current->cta->named[id], threads);
  breathe(false);
}

void warp_sync() {
  gather_warp("warp_sync", 0);
  breathe(false);
}

void cluster_sync() {
  arrive_and_wait(current->cta->cluster->sync, current->cta->cluster->live);
  breathe(false);
}

void cluster_sync_initialised() {
  for (const Barrier& b : current->cta->barriers) {
    if (b.initialiser == current && !b.published) {
      fail("cluster_sync_initialised before a fence_barrier_init of barrier %s[%d]", b.name, b.index);
    }
  }
  cluster_sync();
}

uint32_t shuffle(uint32_t value, uint32_t lane) {
  const uint32_t generation = gather_warp("shuffle", value);
  return current->warp->values[generation][lane & 31];
}

uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
  const uint32_t generation = gather_warp("shuffle_xor", value);
  return current->warp->values[generation][(current->lane ^ mask) & 31];
}

void back_off() {
  ++grid->idle_spins;
  current->wait = Wait::SPIN;
  yield();
}

void grid_dependency_wait() {
  breathe();
  grid->waited_for_dependency = true;
  current->cta->cluster->waited = true;
}

void grid_dependency_launch() {
  breathe();
  if (!current->cta->cluster->waited) chain.lets_go_early = true;
}

}  // namespace fastlora
