// Tensor copies: queued, carried out later, in pieces and in any order.
#include <algorithm>

#include "model.hpp"

namespace fastlora {

namespace model {

namespace {

// A box is 64 elements wide, as wide as the swizzle.
constexpr uint32_t COLUMNS = 64, ROW = 128, PERIOD = 1024;

void check_map(const TensorMap* map, const char* user) {
  if (map->made != MADE) fail("%s: the tensor map was not filled by make_map", user);
}

// Where a row of the box starts in global memory; null outside the matrix.
uint8_t* row_of(const TensorMap& map, int32_t c1, uint32_t row) {
  const int64_t r = int64_t(c1) + row;
  return r < 0 || uint64_t(r) >= map.rows ? nullptr : map.base + uint64_t(r) * map.row_bytes;
}

template <class T>
void erase(std::vector<T*>& list, T* what) {
  list.erase(std::find(list.begin(), list.end(), what));
}

bool inside(const TensorMap& map, int64_t column) { return column >= 0 && uint64_t(column) < map.columns; }

void issue_load(Cta& cta, const TensorMap& map, Shared to, Shared barrier, int32_t c0, int32_t c1) {
  const uint32_t bytes = map.box_rows * ROW;
  if (to % PERIOD != 0) fail("tma_load to %u: not a multiple of %u, the swizzle's period", to, PERIOD);
  uint8_t* memory = cta.at(to, bytes, "tma_load");
  check_writable(cta, to, bytes, "tma_load");
  check_fenced(cta, to, bytes, "tma_load");
  const Barrier& b = barrier_at(cta, barrier, "tma_load");
  if (!b.published) fail("tma_load: barrier %s[%d] is used before a fence_barrier_init", b.name, b.index);
  check_handed_over(map.base, (map.rows - 1) * map.row_bytes + 2 * map.columns, "tma_load");
  // Whoever reads before the copy lands reads NaNs.
  std::memset(memory, 0xFF, bytes);
  const uint32_t split = grid->random.percent(50) ? 0 : grid->random.below(map.box_rows);
  const uint32_t edges[3] = {0, split, map.box_rows};
  for (int i = 0; i < 2; ++i) {
    if (edges[i] == edges[i + 1]) continue;
    Load* load = new Load;
    load->cta = &cta;
    load->map = map;
    load->to = to;
    load->barrier = barrier;
    load->c0 = c0;
    load->c1 = c1;
    load->first = edges[i];
    load->last = edges[i + 1];
    cta.loads.push_back(load);
    grid->add(load);
  }
  ++statistics[LOADS];
  statistics[LOAD_BYTES] += bytes;
}

}  // namespace

bool Load::step() {
  for (uint32_t r = first; r < last; ++r) {
    const uint8_t* from = row_of(map, c1, r);
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      uint8_t* slot = cta->at(swizzled(to + r * ROW + chunk * 16), 16, "tma_load");
      const int64_t column = int64_t(c0) + chunk * 8;
      if (from != nullptr && inside(map, column) && inside(map, column + 7)) {
        std::memcpy(slot, from + column * 2, 16);
        continue;
      }
      for (int64_t i = 0; i < 8; ++i) {
        if (from != nullptr && inside(map, column + i)) {
          std::memcpy(slot + 2 * i, from + (column + i) * 2, 2);
        } else {
          std::memset(slot + 2 * i, 0, 2);
        }
      }
    }
  }
  erase(cta->loads, this);
  grid->remove(this);
  // The bytes outside the matrix count too.
  complete_bytes(*cta, barrier, (last - first) * ROW);
  retire();
  return true;
}

bool Word::step() {
  std::memcpy(cta->at(to, 4, "store_async"), &value, 4);
  grid->remove(this);
  complete_bytes(*cta, barrier, 4);
  retire();
  return true;
}

void Store::read_source() {
  if (read) return;
  read = true;
  const uint32_t bytes = map.box_rows * ROW;
  check_fenced(*cta, from, bytes, "tma_store");
  data.resize(bytes);
  for (uint32_t at = 0; at < bytes; at += 16) std::memcpy(&data[at], cta->at(swizzled(from + at), 16, "tma_store"), 16);
}

bool Store::step() {
  if (!read) {
    read_source();
    return false;
  }
  // Whole chunks of 16 bytes: a row that ends inside one overwrites the rest of it (an H100 does, Triton issue 11583).
  const int64_t end = ceil_div(map.columns, 8) * int64_t(8);
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    uint8_t* to = row_of(map, c1, r);
    for (int64_t i = 0; to != nullptr && i < COLUMNS; ++i) {
      if (c0 + i >= 0 && c0 + i < end) std::memcpy(to + (c0 + i) * 2, &data[r * ROW + 2 * i], 2);
    }
  }
  grid->remove(this);
  written = true;
  if (awaited) {
    if (owner != nullptr) erase(owner->stores, this);
    retire();
  }
  return true;
}

void wait_stores_read(uint32_t pending) {
  breathe(false);
  std::vector<Store*>& stores = current->stores;
  for (size_t i = stores.size(); i-- > 0;) {
    Store* store = stores[i];
    if (store->awaited || store->group + pending >= current->stores_committed) continue;
    store->read_source();
    store->awaited = true;
    erase(store->cta->stores, store);
    if (store->written) {
      stores.erase(stores.begin() + i);
      store->retire();
    }
  }
}

void end_stores(Thread& thread) {
  for (Store* store : thread.stores) {
    if (!store->awaited) fail("a thread ends before the tma_store of shared memory at %u was waited for", store->from);
    store->owner = nullptr;
  }
}

}  // namespace model

using namespace model;

void prefetch_map(const TensorMap* map) { check_map(map, "prefetch_map"); }

void tma_load(Shared to, const TensorMap* map, Shared barrier, int32_t c0, int32_t c1) {
  breathe();
  check_map(map, "tma_load");
  issue_load(*current->cta, *map, to, barrier, c0, c1);
}

void tma_load_multicast(Shared to, const TensorMap* map, Shared barrier, int32_t c0, int32_t c1, uint16_t ctas) {
  breathe();
  check_map(map, "tma_load_multicast");
  if (ctas == 0 || ctas >> grid->shape.cluster != 0) {
    fail("tma_load_multicast to CTAs 0x%x of a cluster of %u", ctas, grid->shape.cluster);
  }
  for (uint32_t rank = 0; rank < grid->shape.cluster; ++rank) {
    if (ctas >> rank & 1) issue_load(cta_of_cluster(rank, "tma_load_multicast"), *map, to, barrier, c0, c1);
  }
}

void store_async(Shared address, uint32_t rank, uint32_t value, Shared barrier) {
  breathe();
  if (grid->shape.cluster < 2) fail("store_async in a cluster of one CTA: undefined by the PTX ISA");
  Cta& cta = cta_of_cluster(rank, "store_async");
  uint8_t* memory = cta.at(address, 4, "store_async");
  check_writable(cta, address, 4, "store_async");
  const Barrier& b = barrier_at(cta, barrier, "store_async");
  if (!b.published) fail("store_async: barrier %s[%d] is used before a fence_barrier_init", b.name, b.index);
  std::memset(memory, 0xFF, 4);
  Word* word = new Word;
  word->cta = &cta;
  word->to = address;
  word->barrier = barrier;
  word->value = value;
  grid->add(word);
}

void tma_store(const TensorMap* map, Shared from, int32_t c0, int32_t c1) {
  breathe();
  check_map(map, "tma_store");
  const uint32_t bytes = map->box_rows * ROW;
  if (from % PERIOD != 0) fail("tma_store from %u: not a multiple of %u, the swizzle's period", from, PERIOD);
  Cta& cta = *current->cta;
  cta.at(from, bytes, "tma_store");
  check_readable(cta, from, bytes, "tma_store");
  check_fenced(cta, from, bytes, "tma_store");
  Store* store = new Store;
  store->owner = current;
  store->cta = &cta;
  store->map = *map;
  store->from = from;
  store->c0 = c0;
  store->c1 = c1;
  store->group = current->stores_committed;
  store->late = grid->random.percent(50);
  current->stores.push_back(store);
  cta.stores.push_back(store);
  grid->add(store);
  ++statistics[STORES];
  statistics[STORE_BYTES] += bytes;
}

void tma_store_commit() {
  breathe();
  ++current->stores_committed;
}

void tma_store_wait_all() {
  wait_stores_read(0);
  const std::vector<Store*> stores = current->stores;
  for (Store* store : stores) {
    if (store->group < current->stores_committed) store->step();
  }
}

}  // namespace fastlora
