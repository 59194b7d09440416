// What the producer and the consumers of lora_matmul_sm90.cu know alike: the call, and what lies where in shared memory.
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
constexpr uint32_t JOB_SLOTS = 2;
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
  // One for each block of TILE_M rows: how many warpgroups have written their rows of z. NULL: another launch makes z.
  uint32_t* flags;
};

// What a tile of 128 x TILE_N does to shared memory.
template <int TILE_N>
struct Layout {
  static constexpr uint32_t W_BYTES = TILE_N * PANEL_ROW_BYTES;
  static constexpr uint32_t STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr uint32_t STAGES = TILE_N == 256 ? 4 : 6;
  // Two buffers of 64 rows x 64 columns for each consumer, in which y leaves.
  static constexpr uint32_t Y_BUFFERS = 2;
  static constexpr uint32_t Y = STAGES * STAGE_BYTES;
  static constexpr uint32_t FULL = Y + CONSUMERS * Y_BUFFERS * PANEL_64;
  static constexpr uint32_t EMPTY = FULL + 8 * STAGES;
  static constexpr uint32_t JOB_FULL = EMPTY + 8 * STAGES;
  static constexpr uint32_t JOB_EMPTY = JOB_FULL + 8 * JOB_SLOTS;
  static constexpr uint32_t JOB = JOB_EMPTY + 8 * JOB_SLOTS;
  static constexpr uint32_t BYTES = JOB + 4 * JOB_SLOTS;
  static_assert(BYTES <= MOST_SHARED_BYTES, "shared memory of a CTA");

  // z jobs: x_mk and PANELS panels of a_rk, so many slices of 64 k a trip.
  static __host__ __device__ constexpr uint32_t slice_bytes(uint32_t panels) { return X_BYTES + panels * PANEL_64; }
  static __host__ __device__ constexpr uint32_t slices(uint32_t panels) { return STAGE_BYTES / slice_bytes(panels); }
};

// What producer and consumers know alike.
template <int TILE_N, int CLUSTER>
struct Block {
  using L = Layout<TILE_N>;
  const Parameters& p;
  Shared memory;
  uint32_t rank;
  Cursor<L::STAGES> trip;
  Cursor<JOB_SLOTS> job;

  __device__ __forceinline__ explicit Block(const Parameters& parameters)
      : p(parameters), memory(shared_memory()), rank(CLUSTER > 1 ? cluster_rank() : 0) {}

  __device__ __forceinline__ Shared stage() const { return memory + trip.slot * L::STAGE_BYTES; }
  __device__ __forceinline__ Shared full() const { return memory + L::FULL + 8 * trip.slot; }
  __device__ __forceinline__ Shared empty(uint32_t slot) const { return memory + L::EMPTY + 8 * slot; }
  __device__ __forceinline__ Shared job_full() const { return memory + L::JOB_FULL + 8 * job.slot; }
  __device__ __forceinline__ Shared job_empty() const { return memory + L::JOB_EMPTY + 8 * job.slot; }
  __device__ __forceinline__ Shared job_word() const { return memory + L::JOB + 4 * job.slot; }

  __device__ __forceinline__ uint32_t row_block(uint32_t unit) const { return unit * CLUSTER + rank; }
  __device__ __forceinline__ uint32_t rank_panels() const { return ceil_div(p.r, PANEL); }

  __device__ void initialise() const {
    for (uint32_t i = 0; i < L::STAGES; ++i) {
      barrier_init(memory + L::FULL + 8 * i, 1, "full", i);
      // w and b land in every CTA of the cluster, so a slot is free when the consumers of all have left it.
      barrier_init(memory + L::EMPTY + 8 * i, CONSUMERS * CLUSTER, "empty", i);
    }
    for (uint32_t i = 0; i < JOB_SLOTS; ++i) {
      barrier_init(memory + L::JOB_FULL + 8 * i, 1, "job_full", i);
      barrier_init(memory + L::JOB_EMPTY + 8 * i, CLUSTER * (CONSUMERS * 4) + CLUSTER - 1, "job_empty", i);
    }
    fence_barrier_init();
  }
};

}  // namespace fastlora::lora_matmul
