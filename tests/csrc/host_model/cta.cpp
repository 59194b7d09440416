// The life of a CTA: its threads start, and what must be settled when they end.
#include <algorithm>
#include <cstdlib>

#include "model.hpp"

namespace fastlora::model {

namespace {

// Their memory and their fibers' stacks serve one CTA after another.
std::vector<std::unique_ptr<Cta>> spare_ctas;

void check_end(Cta& cta) {
  if (!cta.loads.empty()) {
    const Barrier& b = barrier_at(cta, cta.loads[0]->barrier, "tma_load");
    fail("the CTA ends while a tma_load to %u for barrier %s[%d] is in flight", cta.loads[0]->to, b.name, b.index);
  }
  for (const Barrier& b : cta.barriers) {
    if (b.bytes != 0) fail("the CTA ends while barrier %s[%d] expects %ld bytes more", b.name, b.index, long(b.bytes));
  }
  for (size_t i = 0; i + 4 <= cta.warps.size(); i += 4) {
    for (size_t j = i + 1; j < i + 4; ++j) {
      if (cta.warps[j].registers != cta.warps[i].registers) {
        fail("setmaxnreg came in warp %zu or %zu, and not in the rest of their warpgroup", i, j);
      }
    }
  }
}

void thread_main() {
  grid->body.enter(grid->body.call);
  Thread& thread = *current;
  end_stores(thread);
  end_wgmmas(thread);
  thread.exited = true;
  thread.warp->runnable &= ~(1u << thread.lane);
  grid->idle_spins = 0;
  Cta& cta = *thread.cta;
  --cta.live;
  --cta.cluster->live;
  check_sync_points(cta);
  if (cta.live == 0) check_end(cta);
  if (cta.cluster->live == 0) grid->finished.push_back(cta.cluster);
  thread.fiber.suspend();
  std::abort();
}

void start_thread(Cta& cta, Thread& thread, uint32_t index) {
  thread.cta = &cta;
  thread.warp = &cta.warps[index / 32];
  thread.index = index;
  thread.lane = index % 32;
  thread.exited = false;
  thread.wait = Wait::NONE;
  thread.unfenced.clear();
  thread.polled = nullptr;
  thread.stores.clear();
  thread.stores_committed = 0;
  thread.wgmma_issued = 0;
  thread.wgmma_groups.clear();
  thread.wgmma_groups_done = 0;
  thread.wgmma_fenced = false;
  thread.accumulators.clear();
  thread.fiber.start(thread_main);
}

}  // namespace

Cta* start_cta(Cluster& cluster, uint32_t rank, uint32_t x, uint32_t y) {
  if (spare_ctas.empty()) spare_ctas.push_back(std::make_unique<Cta>());
  Cta& cta = *spare_ctas.back().release();
  spare_ctas.pop_back();
  const LaunchShape& shape = grid->shape;
  const uint32_t threads = shape.threads, warps = threads / 32;
  cta.cluster = &cluster;
  cta.rank = rank;
  cta.x = x;
  cta.y = y;
  cta.live = threads;
  cta.memory.assign(shape.shared_bytes, 0xFF);
  cta.writers.assign(shape.shared_bytes / 4 + 1, 0);
  cta.unfenced_words = 0;
  cta.barriers.clear();
  cta.barrier_of.assign(shape.shared_bytes / 8 + 1, 0);
  for (int i = 0; i < 16; ++i) cta.named[i] = {i == 0 ? "cta_sync" : "named_barrier_sync", i, 0, 0, 0, {}};
  cta.loads.clear();
  cta.stores.clear();
  cta.register_waiters.clear();
  // What the compiler may use when one CTA of so many threads fills the multiprocessor.
  const uint32_t registers = std::min(65536 / threads / 8 * 8, 248u);
  cta.free_registers = 0;
  cta.warps.resize(warps);
  for (uint32_t i = 0; i < warps; ++i) {
    Warp& warp = cta.warps[i];
    warp.cta = &cta;
    warp.index = i;
    warp.runnable = ~0u;
    warp.slow = grid->random.below(8) == 0;
    warp.registers = registers;
    warp.collective = nullptr;
    warp.gathered = warp.generation = 0;
    warp.waiters.clear();
    warp.slot = static_cast<uint32_t>(grid->runnable.size());
    grid->runnable.push_back(&warp);
  }
  while (cta.warpgroups.size() < warps / 4) cta.warpgroups.emplace_back();
  for (uint32_t i = 0; i < warps / 4; ++i) {
    Warpgroup& group = cta.warpgroups[i];
    group.cta = &cta;
    group.index = i;
    group.slot = ~0u;
    group.queue.clear();
    group.first = group.executed = group.awaited = 0;
    group.waiters.clear();
    group.spare.clear();
    for (auto& sums : group.pool) group.spare.push_back(sums.get());
  }
  while (cta.threads.size() > threads) cta.threads.pop_back();
  while (cta.threads.size() < threads) cta.threads.emplace_back();
  for (uint32_t i = 0; i < threads; ++i) start_thread(cta, cta.threads[i], i);
  return &cta;
}

void end_cta(Cta* cta) {
  for (Store* store : cta->stores) {
    if (store->written) store->retire();
  }
  cta->stores.clear();
  for (Thread& thread : cta->threads) thread.fiber.release();
  spare_ctas.emplace_back(cta);
}

}  // namespace fastlora::model
