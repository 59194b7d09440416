// The consumers of lora_matmul_sm90.cu: two warpgroups that multiply what the ring holds, 64 of the CTA's rows each.
#pragma once

#include <cstdint>

#include <fastlora.h>
#include <lora_matmul_shared.cuh>

namespace fastlora::lora_matmul {

template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
struct Consumer {
  using L = Layout<TILE_N>;

  const Parameters& p;
  Ring<L::STAGES, L::STAGE_BYTES, CLUSTER> ring;
  JobQueue<CLUSTER> jobs;
  Shared y_buffers;
  // The same in all lanes, as the compiler must know: descriptors and operands of copies are then made once a warp.
  uint32_t consumer;
  uint32_t thread = thread_index() % WARPGROUP;
  Fragment fragment = Fragment(thread);
  uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;

  __device__ void run() {
    for (uint32_t job = jobs.receive(fragment.lane); job != NO_JOB; job = jobs.receive(fragment.lane)) {
      const Schedule& s = p.schedule;
      if (s.makes_z(job)) {
        for (uint32_t unit = s.first_unit(job); unit < s.last_unit(job); ++unit) make_z(row_block(unit));
      } else {
        make_tile(s.tile(job));
      }
    }
    // Shared memory must outlive the stores that read it.
    if (thread == 0) tma_store_wait_read<0>();
  }

  __device__ __forceinline__ uint32_t row_block(uint32_t unit) const { return unit * CLUSTER + rank; }

  __device__ __forceinline__ void sync() const { named_barrier_sync(1 + consumer, WARPGROUP); }

  // acc_mn (+)= this warpgroup's 64 rows of x_mk · w_nkᵀ for 16 k, by the panels that lie at x and w.
  template <bool SET, int N>
  __device__ __forceinline__ void multiply_16(float (&acc_mn)[N / 2], Shared x, Shared w, uint32_t step) const {
    const uint32_t rows = x + consumer * CONSUMER_ROWS * PANEL_ROW_BYTES;
    const uint64_t x_mk = panel_descriptor(rows, PANEL_64) + step * (k16_bytes<false>() >> 4);
    const uint64_t w_kn = panel_descriptor(w, PANEL_64) + step * (k16_bytes<TRANSPOSED>() >> 4);
    if constexpr (SET) {
      wgmma_set<T, N, false, TRANSPOSED>(acc_mn, x_mk, w_kn);
    } else {
      wgmma_add<T, N, false, TRANSPOSED>(acc_mn, x_mk, w_kn);
    }
  }

  // The same for a whole panel, 64 k.
  template <bool SET, int N>
  __device__ __forceinline__ void multiply(float (&acc_mn)[N / 2], Shared x, Shared w) const {
    multiply_16<SET, N>(acc_mn, x, w, 0);
#pragma unroll
    for (uint32_t step = 1; step < 4; ++step) multiply_16<false, N>(acc_mn, x, w, step);
  }

  __device__ void make_tile(TilePosition tile) {
    float acc_mn[TILE_N / 2];
    const uint32_t first_m = row_block(tile.row_unit) * TILE_M + consumer * CONSUMER_ROWS;
    const uint32_t first_n = tile.column * TILE_N;
    const bool masked = p.mask_kind == FASTLORA_MASK_PRODUCT;

    TileMask mask;
    ring.wait();
    wgmma_fence();
    multiply<true, TILE_N>(acc_mn, ring.stage(), ring.stage() + X_BYTES);
    wgmma_commit();
    ring.advance();
    for (uint32_t k = TILE_K; k < p.k; k += TILE_K) {
      ring.wait();
      wgmma_fence();
      multiply<false, TILE_N>(acc_mn, ring.stage(), ring.stage() + X_BYTES);
      wgmma_commit();
      // Under the running wgmma, so that the mask costs nothing.
      if (masked && mask.calls < TileMask::CALLS) mask.make_some(*this, first_m, first_n);
      ring.release_previous();
      ring.advance();
    }
    if (!masked) {
      for (uint32_t r = 0; r < p.r; r += PANEL) {
        ring.wait();
        for (uint32_t step = 0; step < 4 && r + 16 * step < p.r; ++step) {
          wgmma_fence();
          multiply_16<false, TILE_N>(acc_mn, ring.stage(), ring.stage() + X_BYTES, step);
          wgmma_commit();
        }
        ring.drain();
        ring.advance();
      }
    }
    // Before the wait, which hides L2's latency.
    uint32_t bias_n[TILE_N / PANEL] = {};
    if (p.bias != nullptr) load_bias(bias_n, first_n);
    ring.drain();
    wgmma_settle(acc_mn);
    if (masked) {
      while (mask.calls < TileMask::CALLS) mask.make_some(*this, first_m, first_n);
      add_masked_product(acc_mn, mask);
    }
    if (p.bias != nullptr) {
      store_y<true>(acc_mn, bias_n, first_m, first_n);
    } else {
      store_y<false>(acc_mn, bias_n, first_m, first_n);
    }
  }

  // The mask's bits for this thread's part of the tile, one per accumulator, made one Philox call at a time: each lane
  // of a quad computes one of four groups of eight columns, and the lanes exchange them.
  struct TileMask {
    static constexpr uint32_t CALLS = TILE_N / 16;
    uint32_t keep[TILE_N / PANEL] = {};
    uint32_t calls = 0;

    __device__ __forceinline__ void make_some(const Consumer& c, uint32_t first_m, uint32_t first_n) {
      const uint32_t half = calls & 1, four = calls >> 1;
      const MaskBits mask(c.p.mask);
      const uint32_t row = first_m + c.fragment.row() + 8 * half;
      const uint32_t column = first_n + 32 * four + 8 * (c.fragment.lane % 4);
      const Words4 lanes = quad_transpose(mask.lanes(row, column / 8), c.fragment.lane);
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits |= (uint32_t(mask.keeps_low(lanes.w[i])) | uint32_t(mask.keeps_high(lanes.w[i])) << 1) << (4 * i);
      }
      bits <<= 16 * (four & 1) + 2 * half;
#pragma unroll
      for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) keep[chunk] |= four / 2 == chunk ? bits : 0;
      ++calls;
    }
  };

  // acc_mn += D(z_mr · b_nrᵀ), 64 columns at a time, so that the second accumulator is small.
  __device__ __forceinline__ void add_masked_product(float (&acc_mn)[TILE_N / 2], const TileMask& mask) {
    const Cursor<L::STAGES> first = ring.trip;
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      ring.wait();
      ring.advance();
    }
#pragma unroll
    for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) {
      float product_mn[PANEL / 2];
      Cursor<L::STAGES> at = first;
      const auto stage = [&] { return ring.stage(at.slot); };
      wgmma_fence();
      multiply_16<true, PANEL>(product_mn, stage(), stage() + X_BYTES + chunk * PANEL_64, 0);
      wgmma_commit();
      for (uint32_t r = 16; r < p.r; r += 16) {
        if (r % PANEL == 0) at.advance();
        wgmma_fence();
        multiply_16<false, PANEL>(product_mn, stage(), stage() + X_BYTES + chunk * PANEL_64, r / 16 % 4);
        wgmma_commit();
      }
      wgmma_wait<0>();
      wgmma_settle(product_mn);
#pragma unroll
      for (int i = 0; i < PANEL / 2; ++i) {
        acc_mn[chunk * (PANEL / 2) + i] += mask.keep[chunk] >> i & 1 ? product_mn[i] * p.mask.rescale : 0.0f;
      }
    }
    Cursor<L::STAGES> at = first;
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      ring.release(at.slot);
      at.advance();
    }
  }

  // A word of bias for each lane and 64 columns, two elements: store_y hands them round.
  __device__ __forceinline__ void load_bias(uint32_t (&bias_n)[TILE_N / PANEL], uint32_t first_n) const {
#pragma unroll
    for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) {
      const uint32_t n = first_n + chunk * PANEL + 2 * fragment.lane;
      if (n < p.n) bias_n[chunk] = static_cast<const uint32_t*>(p.bias)[n / 2];
    }
  }

  // y_mn <- acc_mn (+ bias_n), through shared memory in panels: the copy engine writes whole rows of 128 bytes, and this
  // warpgroup goes on.
  template <bool BIAS>
  __device__ __forceinline__ void store_y(const float (&acc_mn)[TILE_N / 2], const uint32_t (&bias_n)[TILE_N / PANEL],
                                          uint32_t first_m, uint32_t first_n) const {
    static_assert(TILE_N / PANEL % L::Y_BUFFERS == 0, "each tile starts with the first buffer");
    const Shared buffers = y_buffers + consumer * L::Y_BUFFERS * PANEL_64;
    // Matrices: rows 0-7 and 8-15 of a group of 8 columns, then of the next group.
    Shared places[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      places[i] = buffers + panel_chunk(16 * fragment.warp + fragment.lane % 16, 2 * i + fragment.lane / 16);
    }
#pragma unroll
    for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) {
      const uint32_t buffer = chunk % L::Y_BUFFERS * PANEL_64;
      if (thread == 0) tma_store_wait_read<L::Y_BUFFERS - 1>();
      sync();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int group = j + i / 2, at = chunk * (PANEL / 2) + 4 * group + 2 * (i % 2);
          float low = acc_mn[at], high = acc_mn[at + 1];
          if constexpr (BIAS) {
            const uint32_t pair = shuffle(bias_n[chunk], 4 * group + fragment.lane % 4);
            low += T::widen(pair & 0xFFFF), high += T::widen_high(pair);
          }
          words.w[i] = T::pack(low, high);
        }
        store_matrices4(places[j / 2] + buffer, words);
      }
      fence_async_shared();
      sync();
      if (thread == 0) {
        tma_store(&p.y, buffers + buffer, first_n + chunk * PANEL, first_m);
        tma_store_commit();
      }
    }
  }

  __device__ void make_z(uint32_t block) {
    const uint32_t panels = ceil_div(p.r, PANEL);
    if (panels == 1) {
      make_z_of<1>(block);
    } else if (panels == 2) {
      make_z_of<2>(block);
    } else if constexpr (L::slices(4) > 0) {
      make_z_of<4>(block);
    }
  }

  template <int PANELS>
  __device__ void make_z_of(uint32_t block) {
    float z_mr[PANELS][PANEL / 2];
    const uint32_t first_m = block * TILE_M;
    make_z_trip<true, PANELS>(z_mr, first_m, 0);
    ring.advance();
    for (uint32_t k = L::slices(PANELS) * TILE_K; k < p.k; k += L::slices(PANELS) * TILE_K) {
      make_z_trip<false, PANELS>(z_mr, first_m, k);
      ring.release_previous();
      ring.advance();
    }
    ring.drain();
#pragma unroll
    for (int i = 0; i < PANELS; ++i) wgmma_settle(z_mr[i]);
    store_z<PANELS>(z_mr, block);
  }

  template <bool SET, int PANELS>
  __device__ __forceinline__ void make_z_trip(float (&z_mr)[PANELS][PANEL / 2], uint32_t first_m, uint32_t first_k) {
    constexpr uint32_t SLICES = L::slices(PANELS), SLICE_BYTES = L::slice_bytes(PANELS);
    ring.wait();
    if (p.mask_kind == FASTLORA_MASK_INPUT) mask_x<SLICES, SLICE_BYTES>(first_m, first_k);
    wgmma_fence();
#pragma unroll
    for (uint32_t s = 0; s < SLICES; ++s) {
      const Shared x = ring.stage() + s * SLICE_BYTES;
#pragma unroll
      for (int i = 0; i < PANELS; ++i) {
        const Shared a = x + X_BYTES + i * PANEL_64;
        if (s == 0) {
          multiply<SET, PANEL>(z_mr[i], x, a);
        } else {
          multiply<false, PANEL>(z_mr[i], x, a);
        }
      }
    }
    wgmma_commit();
  }

  // In place: no other warpgroup reads these rows of the slot.
  template <uint32_t SLICES, uint32_t SLICE_BYTES>
  __device__ void mask_x(uint32_t first_m, uint32_t first_k) {
    const MaskBits mask(p.mask);
    for (uint32_t s = 0; s < SLICES; ++s) {
      mask_panel(mask, ring.stage() + s * SLICE_BYTES, consumer * CONSUMER_ROWS, first_m, first_k + s * TILE_K, thread);
    }
    fence_async_shared();
    sync();
  }

  // Columns of z beyond R are zeros and are written too: b's rows are padded likewise.
  template <int PANELS>
  __device__ void store_z(const float (&z_mr)[PANELS][PANEL / 2], uint32_t block) {
    uint16_t* z = static_cast<uint16_t*>(p.z_out);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t m = block * TILE_M + consumer * CONSUMER_ROWS + fragment.row() + 8 * h;
      uint16_t* row = z + m * p.z_stride;
#pragma unroll
      for (int i = 0; i < PANELS; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t r = i * PANEL + 8 * j + fragment.column();
          const float low = z_mr[i][4 * j + 2 * h] * p.scale, high = z_mr[i][4 * j + 2 * h + 1] * p.scale;
          if (m < p.m && r < p.z_columns) hand_over(reinterpret_cast<uint32_t*>(row + r), T::pack(low, high));
        }
      }
    }
    // Beyond M there is no flag, and no tile waits.
    if (p.flags != nullptr && block * TILE_M < p.m) {
      // The copy engine of another CTA reads every thread's rows; one release then covers the whole warpgroup.
      fence_async_global();
      sync();
      if (thread == 0) add_acquire_release(p.flags + block, 1);
    }
  }
};

}  // namespace fastlora::lora_matmul
