// Ordinary loads and stores of shared memory, the fences that make them seen by the copy engine and wgmma, and atomics.
#include "model.hpp"

namespace fastlora {

namespace model {

uint8_t* Cta::at(Shared address, uint32_t bytes, const char* user) {
  if (address < grid->base || address - grid->base + bytes > memory.size()) {
    fail("%s at %u, %u bytes: outside the shared memory %u .. %zu", user, address, bytes, grid->base,
         grid->base + memory.size());
  }
  return memory.data() + (address - grid->base);
}

Cta& cta_of_cluster(uint32_t rank, const char* user) {
  Cluster& cluster = *current->cta->cluster;
  if (rank >= cluster.ctas.size()) fail("%s: CTA %u of a cluster of %zu", user, rank, cluster.ctas.size());
  Cta& cta = *cluster.ctas[rank];
  if (cta.live == 0) fail("%s: CTA %u of the cluster has ended", user, rank);
  return cta;
}

void note_hand_over(const void* to, size_t bytes) {
  const uint8_t* first = static_cast<const uint8_t*>(to);
  std::vector<Chain::HandOver>& memory = chain.memory;
  if (!memory.empty() && memory.back().launch == chain.launch && memory.back().last == first) {
    memory.back().last += bytes;
  } else {
    memory.push_back({chain.launch, first, first + bytes});
  }
}

void check_handed_over(const void* first, size_t bytes, const char* user) {
  if (chain.launch == 0 || current->cta->cluster->waited) return;
  const uint8_t* from = static_cast<const uint8_t*>(first);
  for (const Chain::HandOver& h : chain.memory) {
    if (h.launch > chain.ended && h.launch < chain.launch && h.first < from + bytes && from < h.last) {
      fail("%s of what a launch before hands over, without a grid_dependency_wait for it", user);
    }
  }
}

namespace {

uint16_t mark_of(const Thread& thread) { return static_cast<uint16_t>(1 + thread.cta->rank * 1024 + thread.index); }

void write(Cta& cta, Shared address, const uint32_t* values, uint32_t count, Thread& writer, const char* user) {
  if (address % (4 * count) != 0) fail("%s at %u: not aligned", user, address);
  uint8_t* to = cta.at(address, 4 * count, user);
  check_writable(cta, address, 4 * count, user);
  std::memcpy(to, values, 4 * count);
  const uint32_t first = (address - grid->base) / 4;
  const uint16_t mark = mark_of(writer);
  for (uint32_t i = first; i < first + count; ++i) {
    cta.unfenced_words += cta.writers[i] == 0;
    cta.writers[i] = mark;
  }
  std::vector<Span>& spans = writer.unfenced;
  if (!spans.empty() && spans.back().cta == &cta && spans.back().last == first) {
    spans.back().last = first + count;
  } else {
    spans.push_back({&cta, first, first + count});
  }
}

}  // namespace

}  // namespace model

using namespace model;

Shared shared_memory() { return grid->base; }

uint32_t load_shared(Shared address) {
  breathe(false);
  if (address % 4 != 0) fail("load_shared at %u: not aligned", address);
  uint32_t value;
  check_readable(*current->cta, address, 4, "load_shared");
  std::memcpy(&value, current->cta->at(address, 4, "load_shared"), 4);
  return value;
}

void store_shared(Shared address, uint32_t value) {
  breathe();
  write(*current->cta, address, &value, 1, *current, "store_shared");
}

Words4 load_shared4(Shared address) {
  breathe(false);
  if (address % 16 != 0) fail("load_shared4 at %u: not aligned", address);
  Words4 v;
  check_readable(*current->cta, address, 16, "load_shared4");
  std::memcpy(v.w, current->cta->at(address, 16, "load_shared4"), 16);
  return v;
}

void store_shared4(Shared address, const Words4& v) {
  breathe();
  write(*current->cta, address, v.w, 4, *current, "store_shared4");
}

void store_matrices4(Shared address, const Words4& v) {
  breathe();
  Warp& warp = *current->warp;
  warp.addresses[current->lane] = address;
  warp.words[current->lane] = v;
  gather_warp("store_matrices4", 0, [](Warp& warp) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t matrix = lane / 8, row = lane % 8;
      uint32_t line[4];
      for (uint32_t i = 0; i < 4; ++i) line[i] = warp.words[4 * row + i].w[matrix];
      write(*warp.cta, warp.addresses[lane], line, 4, warp.cta->threads[warp.index * 32 + lane], "store_matrices4");
    }
  });
}

void fence_async_shared() {
  breathe();
  for (const Span& span : current->unfenced) {
    for (uint32_t i = span.first; i < span.last; ++i) {
      if (span.cta->writers[i] == mark_of(*current)) {
        span.cta->writers[i] = 0;
        --span.cta->unfenced_words;
      }
    }
  }
  current->unfenced.clear();
}

void fence_async_global() { breathe(); }

uint32_t atomic_add(uint32_t* address, uint32_t value) {
  breathe(value != 0);
  check_handed_over(address, 4, "atomic_add");
  const uint32_t old = *address;
  *address = old + value;
  return old;
}

uint32_t add_acquire_release(uint32_t* address, uint32_t value) { return atomic_add(address, value); }

uint32_t load_acquire(const uint32_t* address) {
  breathe(false);
  check_handed_over(address, 4, "load_acquire");
  const uint32_t value = *static_cast<const volatile uint32_t*>(address);
  // A second look that sees the same is one more round of a spin, whether it backs off or not.
  if (current->polled == address && current->polled_value == value) back_off();
  current->polled = address;
  current->polled_value = value;
  return value;
}

}  // namespace fastlora
