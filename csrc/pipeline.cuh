// The structure of both kernels: a producer and two consumer warpgroups around a ring of stages in shared memory.
#pragma once

#include <cstdint>

#include <fastlora.h>
#include <layout.cuh>
#include <ptx.cuh>

namespace fastlora {

constexpr uint32_t WARPGROUP = 128;
constexpr uint32_t CONSUMERS = 2;
constexpr uint32_t THREADS = (1 + CONSUMERS) * WARPGROUP;

// Bytes of a panel of 64 rows.
constexpr uint32_t PANEL_64 = 64 * PANEL_ROW_BYTES;

// The most shared memory of a CTA on sm_90.
constexpr uint32_t MOST_SHARED_BYTES = 232448;

// At entry 65536 / 384 = 168 registers a thread; the producer needs few, and the accumulators take what it leaves.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;

// A slot in a ring of SLOTS, and the parity of the lap, which is that of its barriers' phase.
template <uint32_t SLOTS>
struct Cursor {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Stages in shared memory between a producer, which fills them by tensor copies, and two consumers, which read them by
// wgmma; in a cluster each producer copies into the stages of all CTAs. A stage has two barriers: ``full`` when its
// copies have landed, ``empty`` when every consumer of the cluster has read it. Each side advances a Ring of its own.
template <uint32_t STAGES, uint32_t STAGE_BYTES, uint32_t CLUSTER = 1>
struct Ring {
  static constexpr uint32_t BARRIERS_BYTES = 8 * 2 * STAGES;

  Shared stages, barriers;
  Cursor<STAGES> trip;
  uint32_t previous = 0;  // slot of the trip before this one

  __device__ __forceinline__ Ring(Shared stages, Shared barriers) : stages(stages), barriers(barriers) {}

  __device__ __forceinline__ Shared stage(uint32_t slot) const { return stages + slot * STAGE_BYTES; }
  __device__ __forceinline__ Shared stage() const { return stage(trip.slot); }
  __device__ __forceinline__ Shared full(uint32_t slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ Shared full() const { return full(trip.slot); }
  __device__ __forceinline__ Shared empty(uint32_t slot) const { return barriers + 8 * (STAGES + slot); }

  // One thread, before a fence_barrier_init.
  __device__ void initialise() const {
    for (uint32_t slot = 0; slot < STAGES; ++slot) {
      barrier_init(full(slot), 1, "full", slot);
      barrier_init(empty(slot), CONSUMERS * CLUSTER, "empty", slot);
    }
  }

  __device__ __forceinline__ void advance() {
    previous = trip.slot;
    trip.advance();
  }

  // Producer: waits until the stage is free; the copies into it count on full(), and bring so many bytes.
  __device__ __forceinline__ Shared begin(uint32_t bytes) const {
    barrier_wait(empty(trip.slot), trip.parity ^ 1);
    barrier_arrive_expect(full(), bytes);
    return stage();
  }

  // Consumer: waits until the copies of this trip have landed.
  __device__ __forceinline__ void wait() const { barrier_wait(full(), trip.parity); }

  // Consumer: tells every CTA that copies into the slot that this warpgroup has read it.
  __device__ __forceinline__ void release(uint32_t slot) const {
    const uint32_t thread = thread_index() % WARPGROUP;
    if (thread < CLUSTER) {
      if constexpr (CLUSTER > 1) {
        barrier_arrive_at(empty(slot), thread);
      } else {
        barrier_arrive(empty(slot));
      }
    }
  }

  // Consumer, with this trip's wgmmas running: waits for those of the trip before and releases its slot.
  __device__ __forceinline__ void release_previous() const {
    wgmma_wait<1>();
    release(previous);
  }

  // Consumer: waits for all wgmmas and releases the slot of the trip before.
  __device__ __forceinline__ void drain() const {
    wgmma_wait<0>();
    release(previous);
  }
};

// Whether tensor copies can read or write 16-bit elements: rows are contiguous and start on 16 bytes.
inline bool has_aligned_rows(const fastlora_matrix& q) {
  return q.column_stride == 1 && q.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(q.data) % 16 == 0;
}

}  // namespace fastlora
