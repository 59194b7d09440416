// Runs the clusters of a launch: which warp goes on and which copy lands next is drawn from the seed.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <set>
#include <string>

#include "model.hpp"

namespace fastlora::model {

Grid* grid = nullptr;
Thread* current = nullptr;
Settings settings;
Chain chain;
uint64_t statistics[STATISTICS];

namespace {

void end_cluster(Cluster& cluster) {
  for (Cta* cta : cluster.ctas) end_cta(cta);
  cluster.ctas.clear();
}

}  // namespace

// A launch that is not dependent starts when all before it have ended.
void Chain::start(bool dependent) {
  if (!dependent) {
    *this = Chain();
    return;
  }
  if (!lets_go_early) ended = launch - 1;
  ++launch;
  lets_go_early = false;
}

void Grid::start_next_cluster() {
  const uint32_t cluster_index = order[next++];
  const uint32_t clusters_x = shape.blocks_x / shape.cluster;
  clusters.emplace_back();
  Cluster& cluster = clusters.back();
  cluster.live = shape.threads * shape.cluster;
  cluster.waited = false;
  cluster.sync = {"cluster_sync", -1, 0, 0, 0, {}};
  idle_spins = 0;
  for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
    const uint32_t x = cluster_index % clusters_x * shape.cluster + rank;
    cluster.ctas.push_back(start_cta(cluster, rank, x, cluster_index / clusters_x));
  }
}

Grid::~Grid() {
  for (Cluster& cluster : clusters) end_cluster(cluster);
  for (auto* list : {&pending, &late}) {
    while (!list->empty()) {
      Operation* operation = list->back();
      list->pop_back();
      operation->retire();
    }
  }
}

void Grid::add(Operation* operation) {
  auto& list = operation->late ? late : pending;
  operation->slot = static_cast<uint32_t>(list.size());
  list.push_back(operation);
}

void Grid::remove(Operation* operation) {
  auto& list = operation->late ? late : pending;
  list[operation->slot] = list.back();
  list[operation->slot]->slot = operation->slot;
  list.pop_back();
  operation->slot = ~0u;
}

void Grid::run_pending() {
  idle_spins = 0;
  pending[random.below(static_cast<uint32_t>(pending.size()))]->step();
}

void Grid::run_warp(Warp& warp) {
  const uint32_t lanes = warp.runnable, start = random.below(32);
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t lane = (start + i) % 32;
    if ((lanes & warp.runnable) >> lane & 1) {
      current = &warp.cta->threads[warp.index * 32 + lane];
      current->fiber.resume();
      const bool overflowed = current->fiber.overflowed();
      current = nullptr;
      if (failed) throw Failure();
      if (overflowed) fail("the stack of CTA %u lane %u of warp %u is full", warp.cta->x, lane, warp.index);
    }
  }
  if (warp.runnable == 0 && warp.slot != Warp::NOWHERE) {
    runnable[warp.slot] = runnable.back();
    runnable[warp.slot]->slot = warp.slot;
    runnable.pop_back();
    warp.slot = Warp::NOWHERE;
  }
}

bool Grid::all_spin() const {
  for (const Warp* warp : runnable) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (warp->runnable >> lane & 1 && warp->cta->threads[warp->index * 32 + lane].wait != Wait::SPIN) return false;
    }
  }
  return true;
}

void Grid::run() {
  const uint32_t most = settings.resident_clusters;
  size_t ended = 0;
  while (next < order.size() && next < most) start_next_cluster();
  while (true) {
    if (++steps > settings.most_steps) report_deadlock("no end after the most steps that the settings allow");
    if (runnable.empty()) {
      if (pending.empty() && ended == order.size()) break;
      if (pending.empty()) report_deadlock("deadlock");
      run_pending();
      continue;
    }
    if (!pending.empty() && random.percent(async_percent)) {
      run_pending();
      continue;
    }
    Warp* warp = runnable[random.below(static_cast<uint32_t>(runnable.size()))];
    if (warp->slow && random.below(16) != 0) warp = runnable[random.below(static_cast<uint32_t>(runnable.size()))];
    run_warp(*warp);
    while (!finished.empty()) {
      end_cluster(*finished.back());
      finished.pop_back();
      ++ended;
      if (next < order.size()) start_next_cluster();
    }
    if (idle_spins > 20000 + 1000 * runnable.size() && pending.empty() && all_spin()) report_deadlock("deadlock");
  }
  while (!late.empty()) late.back()->step();
  if (shape.dependent && !waited_for_dependency) fail("a dependent launch never called grid_dependency_wait");
}

const char* run_grid(const LaunchShape& shape, const Body& body) {
  static std::mutex one_launch;
  static std::set<std::string> messages;
  const std::lock_guard<std::mutex> lock(one_launch);
  if (shape.blocks_x == 0 || shape.blocks_y == 0 || shape.blocks_y > 65535) return "launch: blocks out of range";
  if (shape.threads == 0 || shape.threads > 1024 || shape.threads % 32 != 0) return "launch: threads out of range";
  if (shape.cluster == 0 || shape.cluster > 8 || shape.blocks_x % shape.cluster != 0) {
    return "launch: the blocks are not whole clusters of at most 8";
  }
  if (shape.shared_bytes > 232448) return "launch: more shared memory than a CTA can have";

  Grid here;
  here.shape = shape;
  here.body = body;
  here.random.seed(settings.seed);
  Random& random = here.random;
  here.base = 1024 * (1 + random.below(4));
  here.leader = random.below(32);
  // Copies that mostly land at once, or mostly long after; threads that are interrupted often, or hardly ever.
  static constexpr uint32_t SHARES[] = {1, 5, 30, 90};
  static constexpr uint32_t MEANS[] = {20, 100, 1000, 10000};
  here.async_percent = SHARES[random.below(4)];
  here.yield_mean = MEANS[random.below(4)];
  if (settings.calls_between_yields != 0) here.yield_mean = settings.calls_between_yields;
  here.calls_to_yield = here.yield_mean;
  // The hardware promises no order of CTAs.
  here.order.resize(size_t(shape.blocks_x / shape.cluster) * shape.blocks_y);
  std::iota(here.order.begin(), here.order.end(), 0u);
  for (size_t i = here.order.size(); i > 1; --i) std::swap(here.order[i - 1], here.order[random.below(uint32_t(i))]);

  grid = &here;
  chain.start(shape.dependent);
  const char* message = nullptr;
  try {
    here.run();
  } catch (const Failure&) {
    message = messages.insert(failure_message()).first->c_str();
  }
  ++statistics[LAUNCHES];
  statistics[STEPS] += here.steps;
  current = nullptr;
  grid = nullptr;
  return message;
}

}  // namespace fastlora::model

// Applies to the launches that follow; 0 stands for the default.
extern "C" void fastlora_model_configure(uint64_t seed, uint32_t resident_clusters, uint32_t calls_between_yields,
                                         uint64_t most_steps) {
  using namespace fastlora::model;
  settings = Settings();
  settings.seed = seed;
  if (resident_clusters != 0) settings.resident_clusters = resident_clusters;
  settings.calls_between_yields = calls_between_yields;
  if (most_steps != 0) settings.most_steps = most_steps;
  std::fill(statistics, statistics + STATISTICS, 0);
}

// How often what happened since the settings were made; -1: there is no such name.
extern "C" int64_t fastlora_model_statistic(const char* name) {
  using namespace fastlora::model;
  static const char* const NAMES[STATISTICS] = {"launches",   "steps",  "wgmmas",      "loads",
                                                "load_bytes", "stores", "store_bytes", "barrier_phases"};
  for (int i = 0; i < STATISTICS; ++i) {
    if (std::strcmp(name, NAMES[i]) == 0) return static_cast<int64_t>(statistics[i]);
  }
  return -1;
}
