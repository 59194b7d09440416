// The producer of lora_matmul_sm90.cu: one thread that takes jobs and fills the ring.
#pragma once

#include <cstdint>

#include <lora_matmul_shared.cuh>

namespace fastlora::lora_matmul {

template <int TILE_N, int CLUSTER, bool TRANSPOSED>
struct Producer {
  using L = Layout<TILE_N>;

  const Parameters& p;
  Ring<L::STAGES, L::STAGE_BYTES, CLUSTER> ring;
  JobQueue<CLUSTER> jobs;
  uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
  bool z_is_there = false;

  __device__ void run() {
    // Before a counter is touched or a packed adapter read. The launch of tiles alone waits later, for its z: its counter
    // is clear, since the launch before lets it start when its own wait is over.
    if (p.schedule.z_jobs > 0) {
      await_launch_before();
      if (p.schedule.columns == 0) grid_dependency_launch();
    }
    for (uint32_t job = next_job(); job != NO_JOB; job = next_job()) {
      const Schedule& s = p.schedule;
      if (s.makes_z(job)) {
        for (uint32_t unit = s.first_unit(job); unit < s.last_unit(job); ++unit) load_z_job(row_block(unit));
      } else {
        load_tile(s.tile(job));
      }
    }
  }

  __device__ __forceinline__ uint32_t row_block(uint32_t unit) const { return unit * CLUSTER + rank; }

  // Called at the end of a job: a cluster that took jobs ahead would hold two while another has none.
  __device__ __forceinline__ uint32_t next_job() { return jobs.next(rank, p.counter, p.schedule.jobs()); }

  // 64 k of TILE_N rows of w or of b: each CTA loads its share into all CTAs of the cluster.
  __device__ __forceinline__ void load_columns(const TensorMap* map, Shared to, uint32_t first_n, uint32_t first_k) {
    if constexpr (TRANSPOSED) {
      constexpr uint32_t PANELS = TILE_N / PANEL / CLUSTER;
#pragma unroll
      for (uint32_t i = 0; i < PANELS; ++i) {
        const uint32_t panel = rank * PANELS + i;
        load_shared_by_all(map, to + panel * PANEL_64, first_n + panel * PANEL, first_k);
      }
    } else {
      constexpr uint32_t ROWS = TILE_N / CLUSTER;
      load_shared_by_all(map, to + rank * ROWS * PANEL_ROW_BYTES, first_k, first_n + rank * ROWS);
    }
  }

  __device__ __forceinline__ void load_shared_by_all(const TensorMap* map, Shared to, uint32_t c0, uint32_t c1) {
    if constexpr (CLUSTER > 1) {
      tma_load_multicast(to, map, ring.full(), c0, c1, (1u << CLUSTER) - 1);
    } else {
      tma_load(to, map, ring.full(), c0, c1);
    }
  }

  __device__ void load_tile(TilePosition tile) {
    const uint32_t block = row_block(tile.row_unit);
    const uint32_t first_m = block * TILE_M, first_n = tile.column * TILE_N;
    for (uint32_t k = 0; k < p.k; k += TILE_K) {
      const Shared to = ring.begin(L::STAGE_BYTES);
      tma_load(to, &p.x, ring.full(), k, first_m);
      load_columns(&p.w, to + X_BYTES, first_n, k);
      ring.advance();
    }
    await_z(block);
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      const Shared to = ring.begin(L::STAGE_BYTES);
      tma_load(to, &p.z, ring.full(), r, first_m);
      load_columns(&p.b, to + X_BYTES, first_n, r);
      ring.advance();
    }
  }

  // Ordinary writes stored what the copy engine reads next: hence the fences.
  __device__ __forceinline__ void await_launch_before() const {
    grid_dependency_wait();
    fence_async_global();
  }

  __device__ __forceinline__ void await_z(uint32_t block) {
    if (p.flags == nullptr) {
      if (!z_is_there) await_launch_before();
      z_is_there = true;
    } else {
      if (block * TILE_M >= p.m) return;
      while (load_acquire(p.flags + block) < CONSUMERS) back_off();
      fence_async_global();
    }
  }

  __device__ void load_z_job(uint32_t block) {
    const uint32_t panels = ceil_div(p.r, PANEL);
    const uint32_t wide = panels == 1 ? 1 : panels == 2 ? 2 : 4;
    const uint32_t slices = L::slices(wide);
    for (uint32_t k = 0; k < p.k; k += slices * TILE_K) {
      const Shared to = ring.begin(slices * L::slice_bytes(wide));
      for (uint32_t s = 0; s < slices; ++s) {
        const uint32_t first_k = k + s * TILE_K;
        const Shared slice = to + s * L::slice_bytes(wide);
        tma_load(slice, &p.x, ring.full(), first_k, block * TILE_M);
        for (uint32_t i = 0; i < wide; ++i) {
          const Shared panel = slice + X_BYTES + i * PANEL_64;
          if (TRANSPOSED) {
            tma_load(panel, &p.a, ring.full(), i * PANEL, first_k);
          } else {
            tma_load(panel, &p.a, ring.full(), first_k, i * PANEL);
          }
        }
      }
      ring.advance();
    }
  }
};

}  // namespace fastlora::lora_matmul
