// mbarriers: a phase ends when its arrivals have come and the bytes that were expected balance those that were copied.
#include "model.hpp"

namespace fastlora {

namespace model {

Barrier& barrier_at(Cta& cta, Shared address, const char* user) {
  if (address % 8 != 0) fail("%s: barrier at %u: not aligned to 8 bytes", user, address);
  cta.at(address, 8, user);
  const uint16_t index = cta.barrier_of[(address - grid->base) / 8];
  if (index == 0) fail("%s: no barrier was initialised at %u in CTA %u", user, address, cta.x);
  return cta.barriers[index - 1];
}

namespace {

constexpr int64_t MOST_BYTES = (1 << 20) - 1;

void end_phase_if_due(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  ++statistics[BARRIER_PHASES];
  // They look again when they run, as the polling loop on the GPU does: by then the phase after may have ended too.
  wake_all(b.waiters);
}

void count_bytes(Barrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (b.bytes > MOST_BYTES || b.bytes < -MOST_BYTES) {
    fail("barrier %s[%d]: %ld pending bytes, more than it can count", b.name, b.index, long(b.bytes));
  }
}

void arrive(Barrier& b) {
  if (b.pending == 0)
    fail("arrives on barrier %s[%d] more often than the %u times of a phase", b.name, b.index, b.arrivals);
  --b.pending;
  end_phase_if_due(b);
}

}  // namespace

void complete_bytes(Cta& cta, Shared barrier, uint32_t bytes) {
  Barrier& b = barrier_at(cta, barrier, "a copy");
  count_bytes(b, -int64_t(bytes));
  end_phase_if_due(b);
}

}  // namespace model

using namespace model;

void barrier_init(Shared barrier, uint32_t arrivals, const char* name, int index) {
  breathe();
  Cta& cta = *current->cta;
  if (barrier % 8 != 0) fail("barrier_init of %s[%d] at %u: not aligned to 8 bytes", name, index, barrier);
  cta.at(barrier, 8, "barrier_init");
  if (arrivals == 0 || arrivals > MOST_BYTES) fail("barrier_init of %s[%d] for %u arrivals", name, index, arrivals);
  uint16_t& slot = cta.barrier_of[(barrier - grid->base) / 8];
  if (slot != 0) {
    const Barrier& b = cta.barriers[slot - 1];
    fail("barrier_init of %s[%d] at %u, where barrier %s[%d] lives", name, index, barrier, b.name, b.index);
  }
  cta.barriers.push_back({barrier, name, index, arrivals, arrivals, 0, 0, false, current, {}});
  slot = static_cast<uint16_t>(cta.barriers.size());
}

void fence_barrier_init() {
  breathe();
  for (Barrier& b : current->cta->barriers) b.published |= b.initialiser == current;
}

void barrier_arrive_expect(Shared barrier, uint32_t bytes) {
  breathe();
  Barrier& b = barrier_at(*current->cta, barrier, "barrier_arrive_expect");
  count_bytes(b, bytes);
  arrive(b);
}

void barrier_arrive(Shared barrier) {
  breathe();
  arrive(barrier_at(*current->cta, barrier, "barrier_arrive"));
}

void barrier_arrive_at(Shared barrier, uint32_t rank) {
  breathe();
  Barrier& b = barrier_at(cta_of_cluster(rank, "barrier_arrive_at"), barrier, "barrier_arrive_at");
  if (!b.published) fail("barrier_arrive_at: barrier %s[%d] is used before a fence_barrier_init", b.name, b.index);
  arrive(b);
}

void barrier_wait(Shared barrier, uint32_t parity) {
  breathe(false);
  if (parity > 1) fail("barrier_wait for parity %u", parity);
  Barrier& b = barrier_at(*current->cta, barrier, "barrier_wait");
  while ((b.phase & 1) == parity) block(Wait::BARRIER, &b, parity, b.waiters);
}

void barrier_wait_cluster(Shared barrier, uint32_t parity) { barrier_wait(barrier, parity); }

}  // namespace fastlora
