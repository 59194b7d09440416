// State shared by producer and consumers of lora_matmul_sm90.cu: the call, the map of shared memory, the queue of jobs.
#pragma once

#include <cstdint>

#include <layout.cuh>
#include <philox.cuh>
#include <pipeline.cuh>
#include <ptx.cuh>
#include <schedule.cuh>

namespace fastlora::lora_matmul {

constexpr uint32_t CONSUMER_ROWS = TILE_M / CONSUMERS;
constexpr uint32_t X_BYTES = TILE_M * PANEL_ROW_BYTES;
constexpr uint32_t NO_JOB = ~0u;

struct Parameters {
  TensorMap x, w, a, b, z, y;
  const void* bias;
  void* z_out;
  int64_t z_stride;
  uint32_t m, n, k, r, z_columns;
  float scale;
  int32_t mask_kind;
  Mask mask;
  Schedule schedule;
  uint32_t* counter;
  // Per block of TILE_M rows the number of warpgroups that have written their rows of z. NULL: another launch makes z.
  uint32_t* flags;
};

// Jobs on their way from the counter to the warps. The producer of the cluster's first CTA broadcasts each job to the
// consumers of all CTAs and to the other producers, and these acknowledge to it. A slot has two barriers and a word:
// ``full`` when the word has landed in this CTA, ``empty`` (the first CTA's alone) when the whole cluster has read it.
// The word of the first CTA is an ordinary store: in a cluster of one the PTX ISA leaves st.async undefined.
template <int CLUSTER>
struct JobQueue {
  static constexpr uint32_t SLOTS = 2;
  static constexpr uint32_t BYTES = SLOTS * (8 + 8 + 4);

  Shared memory;
  Cursor<SLOTS> at;

  __device__ __forceinline__ explicit JobQueue(Shared memory) : memory(memory) {}

  __device__ __forceinline__ Shared full(uint32_t slot) const { return memory + 8 * slot; }
  __device__ __forceinline__ Shared empty(uint32_t slot) const { return memory + 8 * (SLOTS + slot); }
  __device__ __forceinline__ Shared full() const { return full(at.slot); }
  __device__ __forceinline__ Shared empty() const { return empty(at.slot); }
  __device__ __forceinline__ Shared word() const { return memory + 16 * SLOTS + 4 * at.slot; }

  // One thread, before a fence_barrier_init.
  __device__ void initialise() const {
    for (uint32_t slot = 0; slot < SLOTS; ++slot) {
      barrier_init(full(slot), 1, "job_full", slot);
      barrier_init(empty(slot), CLUSTER * (CONSUMERS * 4) + CLUSTER - 1, "job_empty", slot);
    }
  }

  __device__ __forceinline__ void await_word() const {
    if constexpr (CLUSTER > 1) {
      barrier_wait_cluster(full(), at.parity);
    } else {
      barrier_wait(full(), at.parity);
    }
  }

  // To the first CTA: this warp, or producer, has read the word.
  __device__ __forceinline__ void acknowledge() const {
    if constexpr (CLUSTER > 1) {
      barrier_arrive_at(empty(), 0);
    } else {
      barrier_arrive(empty());
    }
  }

  // Producer: that of the first CTA takes the next of ``jobs`` and broadcasts it, another receives it.
  __device__ __forceinline__ uint32_t next(uint32_t rank, uint32_t* counter, uint32_t jobs) {
    uint32_t job;
    if (rank == 0) {
      const uint32_t taken = atomic_add(counter, 1);
      job = taken < jobs ? taken : NO_JOB;
      // Until the word before it in the slot has landed and been read, in every CTA.
      barrier_wait(empty(), at.parity ^ 1);
      store_shared(word(), job);
      barrier_arrive(full());
      for (uint32_t cta = 1; cta < CLUSTER; ++cta) store_async(word(), cta, job, full());
    } else {
      barrier_arrive_expect(full(), 4);
      await_word();
      job = load_shared(word());
      acknowledge();
    }
    at.advance();
    return job;
  }

  // Consumer: a whole warp.
  __device__ __forceinline__ uint32_t receive(uint32_t lane) {
    await_word();
    const uint32_t job = shuffle(load_shared(word()), 0);
    warp_sync();
    if (lane == 0) acknowledge();
    at.advance();
    return job;
  }
};

// Shared memory of a CTA for tiles of 128 x 128 and of 128 x 256, in bytes:
//
//   128 x 128   128 x 256
//           0           0   6 stages of 32 KB, 4 of 48 KB: x_mk and w_nk, z_mr and b_nr, or slices of x_mk and a_rk
//      196608      196608   y: two buffers of 64 rows x 64 columns per consumer, 8 KB each
//      229376      229376   barriers of the stages
//      229472      229440   queue of jobs
//      229512      229480   end
template <int TILE_N>
struct Layout {
  static constexpr uint32_t STAGES = TILE_N == 256 ? 4 : 6;
  static constexpr uint32_t STAGE_BYTES = X_BYTES + TILE_N * PANEL_ROW_BYTES;
  static constexpr uint32_t Y_BUFFERS = 2;

  static constexpr uint32_t Y = STAGES * STAGE_BYTES;
  static constexpr uint32_t BARRIERS = Y + CONSUMERS * Y_BUFFERS * PANEL_64;
  static constexpr uint32_t JOBS = BARRIERS + Ring<STAGES, STAGE_BYTES>::BARRIERS_BYTES;
  static constexpr uint32_t BYTES = JOBS + JobQueue<1>::BYTES;
  static_assert(BYTES <= MOST_SHARED_BYTES, "shared memory of a CTA");

  // A trip of a z job: slices of 64 k, each x_mk and ``panels`` panels of a_rk.
  static __host__ __device__ constexpr uint32_t slice_bytes(uint32_t panels) { return X_BYTES + panels * PANEL_64; }
  static __host__ __device__ constexpr uint32_t slices(uint32_t panels) { return STAGE_BYTES / slice_bytes(panels); }
};

}  // namespace fastlora::lora_matmul
