// csrc/ptx.cuh for a machine without a GPU: the same names, on simulated threads. What each does stands there; what of
// the hardware is modelled, and what is not, stands in README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.hpp"
#include "words.hpp"

namespace fastlora {

using Shared = uint32_t;

// A matrix of 16-bit elements that is copied in boxes of box_rows x 64 columns. Filled by make_map.
struct alignas(64) TensorMap {
  uint8_t* base;
  uint64_t rows, columns, row_bytes;
  uint32_t box_rows;
  uint32_t made;
};

struct Words4 {
  uint32_t w[4];
};

namespace model {

struct WgmmaShape {
  int n;
  bool fp16, a_mn_major, b_mn_major;
};

void issue_wgmma(const WgmmaShape& shape, float* d, uint64_t a, uint64_t b, bool accumulate);
void wait_wgmma(uint32_t pending);
void wait_stores_read(uint32_t pending);
void set_registers(uint32_t registers, bool increase);
void note_hand_over(const void* to, size_t bytes);

}  // namespace model

uint32_t thread_index();
uint32_t shuffle(uint32_t value, uint32_t lane);
uint32_t warp_index();
uint32_t block_index();
uint32_t block_index_y();
uint32_t grid_blocks();
uint32_t grid_blocks_y();
uint32_t cluster_rank();
bool elect_one();

Shared shared_memory();
uint32_t load_shared(Shared address);
void store_shared(Shared address, uint32_t value);
Words4 load_shared4(Shared address);
void store_shared4(Shared address, const Words4& v);
void store_matrices4(Shared address, const Words4& v);
void store_async(Shared address, uint32_t rank, uint32_t value, Shared barrier);

template <class Value>
void hand_over(Value* to, Value value) {
  model::note_hand_over(to, sizeof(Value));
  *to = value;
}
uint32_t atomic_add(uint32_t* address, uint32_t value);
uint32_t add_acquire_release(uint32_t* address, uint32_t value);
uint32_t load_acquire(const uint32_t* address);
void back_off();

void barrier_init(Shared barrier, uint32_t arrivals, const char* name, int index = 0);
void fence_barrier_init();
void barrier_arrive_expect(Shared barrier, uint32_t bytes);
void barrier_arrive(Shared barrier);
void barrier_arrive_at(Shared barrier, uint32_t rank);
void barrier_wait(Shared barrier, uint32_t parity);
void barrier_wait_cluster(Shared barrier, uint32_t parity);

void cta_sync();
void warp_sync();
void cluster_sync();
void cluster_sync_initialised();
void named_barrier_sync(uint32_t id, uint32_t threads);
uint32_t shuffle_xor(uint32_t value, uint32_t mask);

void fence_async_shared();
void fence_async_global();

void prefetch_map(const TensorMap* map);
void tma_load(Shared to, const TensorMap* map, Shared barrier, int32_t c0, int32_t c1);
void tma_load_multicast(Shared to, const TensorMap* map, Shared barrier, int32_t c0, int32_t c1, uint16_t ctas);
void tma_store(const TensorMap* map, Shared from, int32_t c0, int32_t c1);
void tma_store_commit();
template <int PENDING>
void tma_store_wait_read() {
  model::wait_stores_read(PENDING);
}
void tma_store_wait_all();

void grid_dependency_wait();
void grid_dependency_launch();

template <int REGISTERS>
void registers_decrease() {
  model::set_registers(REGISTERS, false);
}

template <int REGISTERS>
void registers_increase() {
  model::set_registers(REGISTERS, true);
}

void wgmma_fence();
void wgmma_commit();
template <int PENDING>
void wgmma_wait() {
  model::wait_wgmma(PENDING);
}

// Sums are in memory here, where the compiler cannot read them early.
template <int COUNT>
void wgmma_settle(float (&)[COUNT]) {}

template <class T, int N, bool A_MN_MAJOR, bool B_MN_MAJOR>
void wgmma_add(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 256, "an N in use");
  model::issue_wgmma({N, !T::IS_BF16, A_MN_MAJOR, B_MN_MAJOR}, d, a, b, true);
}

template <class T, int N, bool A_MN_MAJOR, bool B_MN_MAJOR>
void wgmma_set(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 256, "an N in use");
  model::issue_wgmma({N, !T::IS_BF16, A_MN_MAJOR, B_MN_MAJOR}, d, a, b, false);
}

}  // namespace fastlora
