// Who may touch shared memory while copies and wgmmas are in flight. On the GPU these are races, lost at some times
// only: here they are reported whenever the accesses come in the wrong order, whatever has been carried out by then.
#include "model.hpp"

namespace fastlora::model {

namespace {

bool overlap(Shared a, uint32_t a_bytes, Shared b, uint32_t b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

}  // namespace

void check_readable(Cta& cta, Shared address, uint32_t bytes, const char* user) {
  for (const Load* load : cta.loads) {
    if (overlap(address, bytes, load->to, load->map.box_rows * 128)) {
      const Barrier& b = barrier_at(cta, load->barrier, "tma_load");
      fail("%s at %u while a tma_load to %u for barrier %s[%d] is in flight", user, address, load->to, b.name, b.index);
    }
  }
}

void check_writable(Cta& cta, Shared address, uint32_t bytes, const char* user) {
  for (const Barrier& b : cta.barriers) {
    if (overlap(address, bytes, b.address, 8)) {
      fail("%s at %u, %u bytes: writes over barrier %s[%d] at %u", user, address, bytes, b.name, b.index, b.address);
    }
  }
  check_readable(cta, address, bytes, user);
  for (const Store* store : cta.stores) {
    if (overlap(address, bytes, store->from, store->map.box_rows * 128)) {
      fail("%s at %u while nobody has waited for the tma_store from %u to be read", user, address, store->from);
    }
  }
  for (const Warpgroup& group : cta.warpgroups) {
    for (const Wgmma& op : group.queue) {
      if (op.a.reads(address, bytes) || op.b.reads(address, bytes)) {
        fail("%s at %u, an operand of a wgmma of warpgroup %u that nobody has waited for", user, address, group.index);
      }
    }
  }
}

void check_fenced(Cta& cta, Shared address, uint32_t bytes, const char* user) {
  if (cta.unfenced_words == 0) return;
  const uint32_t first = (address - grid->base) / 4;
  for (uint32_t i = first; i < first + bytes / 4; ++i) {
    if (cta.writers[i] != 0) {
      const uint32_t writer = (cta.writers[i] - 1u) % 1024;
      fail(
          "%s touches shared memory at %u (CTA %u), which thread %u (warp %u) wrote without a fence_async_shared after",
          user, grid->base + 4 * i, cta.x, writer, writer / 32);
    }
  }
}

}  // namespace fastlora::model
