// lora_matmul for sm_90a: the frozen product and the low-rank one in one accumulator, on TMA and wgmma.
//
//   z = scale · D(x) aᵀ                          y = x wᵀ + z bᵀ + bias              mask on the input
//   z = scale · x aᵀ                             y = x wᵀ + D(z bᵀ) + bias           mask on the product
//
// Persistent: each cluster takes jobs from one atomic counter, in the order of schedule.cuh.
//
//   producer (one thread)                        two consumer warpgroups, 64 rows of the CTA's 128 each
//   z job, for each block of 128 rows:           z_mr += D(x_mk) · a_rkᵀ over the ring
//     for k: ring <- x_mk, a_rk                  z_mr <- scale · z_mr, rounded, to memory; add to flag[m]
//   tile:
//     for k: ring <- x_mk, w_nk                  acc_mn += x_mk · w_nkᵀ
//     wait until flag[m] says z_mr is whole
//     for r: ring <- z_mr, b_nr                  acc_mn += z_mr · b_nrᵀ, or (acc + D(z_mr · b_nrᵀ)) by 64 columns
//                                                y_mn <- acc_mn + bias_n, 64 columns at a time by way of shared memory
//
// The low-rank product is one more trip of the same ring for each 64 of rank, of which it multiplies ceil(R / 16)
// steps.
// Operands: x [M, K], y [M, N], z [M, R] 16-bit, rows of whole 16 bytes; w [N, K] or stored [K, N]; a, b as w, packed
// by a small kernel first where they are float32 or their rows are not whole 16 bytes; R <= 256.
// Bytes: the frozen product's, plus one read of x by the z jobs, which are few CTAs' work beside the others' tiles.
// Designs: ONE_LAUNCH as above; SERIAL makes z in a launch of z jobs alone, and the launch of tiles depends on it.

#include <cstdint>
#include <cstdio>

#include <fastlora.h>
#include <layout.cuh>
#include <philox.cuh>
#include <pipeline.cuh>
#include <ptx.cuh>
#include <schedule.cuh>

#include <launch.cuh>

namespace fastlora {
namespace {

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

template <int TILE_N, int CLUSTER, bool TRANSPOSED>
struct Producer : Block<TILE_N, CLUSTER> {
  using Base = Block<TILE_N, CLUSTER>;
  using L = typename Base::L;
  using Base::p;
  using Base::rank;
  using Base::trip;
  bool z_is_there = false;

  using Base::Base;

  __device__ void run() {
    for (uint32_t job = next_job(); job != NO_JOB; job = next_job()) {
      const Schedule& s = p.schedule;
      if (s.makes_z(job)) {
        for (uint32_t unit = s.first_unit(job); unit < s.last_unit(job); ++unit) load_z_job(this->row_block(unit));
      } else {
        load_tile(s.tile(job));
      }
    }
  }

  // The cluster's first CTA draws, and tells everybody. At the end of a job: a cluster that draws ahead would take two
  // while another has none.
  __device__ uint32_t next_job() {
    uint32_t job;
    if (rank == 0) {
      const uint32_t drawn = atomic_add(p.counter, 1);
      job = drawn < p.schedule.jobs() ? drawn : NO_JOB;
      barrier_wait(this->job_empty(), this->job.parity ^ 1);
      for (uint32_t cta = 0; cta < CLUSTER; ++cta) {
        store_cluster(this->job_word(), cta, job);
        barrier_arrive_at(this->job_full(), cta);
      }
    } else {
      barrier_wait(this->job_full(), this->job.parity);
      job = load_shared(this->job_word());
      barrier_arrive_at(this->job_empty(), 0);
    }
    this->job.advance();
    return job;
  }

  __device__ __forceinline__ Shared begin_trip(uint32_t bytes) {
    barrier_wait(this->empty(trip.slot), trip.parity ^ 1);
    barrier_arrive_expect(this->full(), bytes);
    return this->stage();
  }

  // 64 k of TILE_N rows of w, or of b: each CTA of the cluster brings its share to all.
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
      tma_load_multicast(to, map, this->full(), c0, c1, (1u << CLUSTER) - 1);
    } else {
      tma_load(to, map, this->full(), c0, c1);
    }
  }

  __device__ void load_tile(TilePosition tile) {
    const uint32_t block = this->row_block(tile.row_unit);
    const uint32_t first_m = block * TILE_M, first_n = tile.column * TILE_N;
    for (uint32_t k = 0; k < p.k; k += TILE_K) {
      const Shared to = begin_trip(L::STAGE_BYTES);
      tma_load(to, &p.x, this->full(), k, first_m);
      load_columns(&p.w, to + X_BYTES, first_n, k);
      trip.advance();
    }
    await_z(block);
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      const Shared to = begin_trip(L::STAGE_BYTES);
      tma_load(to, &p.z, this->full(), r, first_m);
      load_columns(&p.b, to + X_BYTES, first_n, r);
      trip.advance();
    }
  }

  // z was stored by ordinary writes and is about to be read by the copy engine: hence the fence.
  __device__ __forceinline__ void await_z(uint32_t block) {
    if (p.flags == nullptr) {
      if (!z_is_there) grid_dependency_wait();
      z_is_there = true;
    } else {
      if (block * TILE_M >= p.m) return;
      while (load_acquire(p.flags + block) < CONSUMERS) back_off();
    }
    fence_async_global();
  }

  __device__ void load_z_job(uint32_t block) {
    const uint32_t panels = this->rank_panels();
    const uint32_t wide = panels == 1 ? 1 : panels == 2 ? 2 : 4;
    const uint32_t slices = L::slices(wide);
    for (uint32_t k = 0; k < p.k; k += slices * TILE_K) {
      const Shared to = begin_trip(slices * L::slice_bytes(wide));
      for (uint32_t s = 0; s < slices; ++s) {
        const uint32_t first_k = k + s * TILE_K;
        const Shared slice = to + s * L::slice_bytes(wide);
        tma_load(slice, &p.x, this->full(), first_k, block * TILE_M);
        for (uint32_t i = 0; i < wide; ++i) {
          const Shared panel = slice + X_BYTES + i * PANEL_64;
          if (TRANSPOSED) {
            tma_load(panel, &p.a, this->full(), i * PANEL, first_k);
          } else {
            tma_load(panel, &p.a, this->full(), first_k, i * PANEL);
          }
        }
      }
      trip.advance();
    }
  }
};

template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
struct Consumer : Block<TILE_N, CLUSTER> {
  using Base = Block<TILE_N, CLUSTER>;
  using L = typename Base::L;
  using Base::memory;
  using Base::p;
  using Base::trip;

  uint32_t consumer, thread;
  Fragment fragment;
  uint32_t y_buffer = 0;

  __device__ __forceinline__ explicit Consumer(const Parameters& parameters)
      : Base(parameters),
        consumer(thread_index() / WARPGROUP - 1),
        thread(thread_index() % WARPGROUP),
        fragment(thread) {}

  __device__ void run() {
    for (uint32_t job = next_job(); job != NO_JOB; job = next_job()) {
      const Schedule& s = p.schedule;
      if (s.makes_z(job)) {
        for (uint32_t unit = s.first_unit(job); unit < s.last_unit(job); ++unit) make_z(this->row_block(unit));
      } else {
        make_tile(s.tile(job));
      }
    }
    // Shared memory must outlive the stores that read it.
    if (thread == 0) tma_store_wait_read<0>();
  }

  __device__ uint32_t next_job() {
    barrier_wait(this->job_full(), this->job.parity);
    const uint32_t job = load_shared(this->job_word());
    warp_sync();
    if (thread % 32 == 0) barrier_arrive_at(this->job_empty(), 0);
    this->job.advance();
    return job;
  }

  __device__ __forceinline__ void sync() const { named_barrier_sync(1 + consumer, WARPGROUP); }

  // This warpgroup has done with the slot, in every CTA that copies into it.
  __device__ __forceinline__ void release(uint32_t slot) const {
    if (thread < CLUSTER) {
      if constexpr (CLUSTER > 1) {
        barrier_arrive_at(this->empty(slot), thread);
      } else {
        barrier_arrive(this->empty(slot));
      }
    }
  }

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
    const uint32_t first_m = this->row_block(tile.row_unit) * TILE_M + consumer * CONSUMER_ROWS;
    const uint32_t first_n = tile.column * TILE_N;
    const bool masked = p.mask_kind == FASTLORA_MASK_PRODUCT;

    TileMask mask;
    // A slot is given back when the wgmmas of the trip after it are running: two trips are in flight.
    barrier_wait(this->full(), trip.parity);
    wgmma_fence();
    multiply<true, TILE_N>(acc_mn, this->stage(), this->stage() + X_BYTES);
    wgmma_commit();
    uint32_t previous = trip.slot;
    trip.advance();
    for (uint32_t k = TILE_K; k < p.k; k += TILE_K) {
      barrier_wait(this->full(), trip.parity);
      wgmma_fence();
      multiply<false, TILE_N>(acc_mn, this->stage(), this->stage() + X_BYTES);
      wgmma_commit();
      // Under the running wgmma, so that the mask costs nothing.
      if (masked && mask.calls < TileMask::CALLS) mask.make_some(*this, first_m, first_n);
      wgmma_wait<1>();
      release(previous);
      previous = trip.slot;
      trip.advance();
    }
    if (!masked) {
      for (uint32_t r = 0; r < p.r; r += PANEL) {
        barrier_wait(this->full(), trip.parity);
        for (uint32_t step = 0; step < 4 && r + 16 * step < p.r; ++step) {
          wgmma_fence();
          multiply_16<false, TILE_N>(acc_mn, this->stage(), this->stage() + X_BYTES, step);
          wgmma_commit();
        }
        wgmma_wait<0>();
        release(previous);
        previous = trip.slot;
        trip.advance();
      }
    }
    wgmma_wait<0>();
    release(previous);
    if (masked) {
      while (mask.calls < TileMask::CALLS) mask.make_some(*this, first_m, first_n);
      add_masked_product(acc_mn, mask);
    }
    store_y(acc_mn, first_m, first_n);
  }

  // The mask's bits for this thread's part of the tile, one for each accumulator, made a call at a time: each lane of a
  // quad decides one of four groups of eight columns, and all share them.
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

  // acc_mn += D(z_mr · b_nrᵀ), 64 columns at a time: the product is a second accumulator, and only so large.
  __device__ __forceinline__ void add_masked_product(float (&acc_mn)[TILE_N / 2], const TileMask& mask) {
    const Cursor<L::STAGES> first = trip;
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      barrier_wait(this->full(), trip.parity);
      trip.advance();
    }
#pragma unroll
    for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) {
      float product_mn[PANEL / 2];
      Cursor<L::STAGES> at = first;
      const auto stage = [&] { return memory + at.slot * L::STAGE_BYTES; };
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
#pragma unroll
      for (int i = 0; i < PANEL / 2; ++i) {
        acc_mn[chunk * (PANEL / 2) + i] += mask.keep[chunk] >> i & 1 ? product_mn[i] * p.mask.rescale : 0.0f;
      }
    }
    Cursor<L::STAGES> at = first;
    for (uint32_t r = 0; r < p.r; r += PANEL) {
      release(at.slot);
      at.advance();
    }
  }

  // By way of shared memory in panels, so that the copy engine writes whole rows of 128 bytes and this warpgroup goes
  // on.
  __device__ void store_y(const float (&acc_mn)[TILE_N / 2], uint32_t first_m, uint32_t first_n) {
    const uint16_t* bias = static_cast<const uint16_t*>(p.bias);
#pragma unroll
    for (int chunk = 0; chunk < TILE_N / PANEL; ++chunk) {
      const Shared panel = memory + L::Y + (consumer * L::Y_BUFFERS + y_buffer) * PANEL_64;
      y_buffer ^= 1;
      if (thread == 0) tma_store_wait_read<L::Y_BUFFERS - 1>();
      sync();
      const uint32_t chunk_n = first_n + chunk * PANEL;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int group = j + i / 2, at = chunk * (PANEL / 2) + 4 * group + 2 * (i % 2);
          float low = acc_mn[at], high = acc_mn[at + 1];
          const uint32_t n = chunk_n + 8 * group + fragment.column();
          if (bias != nullptr && n < p.n) {
            low += T::widen(bias[n]);
            high += T::widen(bias[n + 1]);
          }
          words.w[i] = T::pack(low, high);
        }
        // Matrices: rows 0-7 and 8-15 of group j, then of group j + 1.
        const uint32_t row = 16 * fragment.warp + fragment.lane % 16, group = j + fragment.lane / 16;
        store_matrices4(panel + panel_chunk(row, group), words);
      }
      fence_async_shared();
      sync();
      if (thread == 0) {
        tma_store(&p.y, panel, chunk_n, first_m);
        tma_store_commit();
      }
    }
  }

  __device__ void make_z(uint32_t block) {
    const uint32_t panels = this->rank_panels();
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
    uint32_t previous = trip.slot;
    trip.advance();
    for (uint32_t k = L::slices(PANELS) * TILE_K; k < p.k; k += L::slices(PANELS) * TILE_K) {
      make_z_trip<false, PANELS>(z_mr, first_m, k);
      wgmma_wait<1>();
      release(previous);
      previous = trip.slot;
      trip.advance();
    }
    wgmma_wait<0>();
    release(previous);
    store_z<PANELS>(z_mr, block);
  }

  template <bool SET, int PANELS>
  __device__ __forceinline__ void make_z_trip(float (&z_mr)[PANELS][PANEL / 2], uint32_t first_m, uint32_t first_k) {
    constexpr uint32_t SLICES = L::slices(PANELS), SLICE_BYTES = L::slice_bytes(PANELS);
    barrier_wait(this->full(), trip.parity);
    if (p.mask_kind == FASTLORA_MASK_INPUT) mask_x<SLICES, SLICE_BYTES>(first_m, first_k);
    wgmma_fence();
#pragma unroll
    for (uint32_t s = 0; s < SLICES; ++s) {
      const Shared x = this->stage() + s * SLICE_BYTES;
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

  // In place: nobody else reads this warpgroup's rows of the slot.
  template <uint32_t SLICES, uint32_t SLICE_BYTES>
  __device__ void mask_x(uint32_t first_m, uint32_t first_k) {
    const MaskBits mask(p.mask);
    for (uint32_t s = 0; s < SLICES; ++s) {
      mask_panel(mask, this->stage() + s * SLICE_BYTES, consumer * CONSUMER_ROWS, first_m, first_k + s * TILE_K,
                 thread);
    }
    fence_async_shared();
    sync();
  }

  // Columns of z beyond R are written as the zeros that they are: b's rows are padded likewise.
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
          if (m < p.m && r < p.z_columns) *reinterpret_cast<uint32_t*>(row + r) = T::pack(low, high);
        }
      }
    }
    if (p.flags != nullptr) {
      // Every thread's rows are for the copy engine of another CTA; then one release covers the whole warpgroup.
      fence_async_global();
      sync();
      if (thread == 0) add_acquire_release(p.flags + block, 1);
    }
  }
};

template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1) lora_matmul_kernel(const __grid_constant__ Parameters p) {
  const uint32_t warp = warp_index();
  if (warp == 0 && elect_one()) {
    Block<TILE_N, CLUSTER>(p).initialise();
    prefetch_map(&p.x);
    if (p.schedule.columns > 0) prefetch_map(&p.w);
  }
  warp_sync();
  if (CLUSTER > 1) {
    cluster_sync();
  } else {
    cta_sync();
  }
  grid_dependency_launch();
  if (warp < WARPGROUP / 32) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (warp == 0 && elect_one()) Producer<TILE_N, CLUSTER, TRANSPOSED>(p).run();
    warp_sync();
  } else {
    registers_increase<CONSUMER_REGISTERS>();
    Consumer<T, TILE_N, CLUSTER, TRANSPOSED>(p).run();
  }
  // Until all have arrived, somebody may still write into this CTA's shared memory.
  if (CLUSTER > 1) cluster_sync();
}

// An adapter that the copy engine cannot take as it is: 16-bit, rows of ``columns`` padded with zeros.
struct Packing {
  const void* from;
  uint16_t* to;
  uint32_t rows, columns, padded;
  int64_t stride_row, stride_column;
  int32_t is_float;
};

struct PackParameters {
  Packing packing[2];
};

constexpr uint32_t PACK_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(const __grid_constant__ PackParameters p) {
  for (const Packing& q : p.packing) {
    const uint32_t size = q.rows * q.padded;
    for (uint32_t i = block_index() * PACK_THREADS + thread_index(); i < size; i += grid_blocks() * PACK_THREADS) {
      const uint32_t row = i / q.padded, column = i % q.padded;
      const int64_t at = row * q.stride_row + column * q.stride_column;
      if (column >= q.columns) {
        q.to[i] = 0;
      } else if (q.is_float) {
        q.to[i] = T::round(static_cast<const float*>(q.from)[at]);
      } else {
        q.to[i] = static_cast<const uint16_t*>(q.from)[at];
      }
    }
  }
}

constexpr uint64_t round_up(uint64_t size, uint64_t step) { return (size + step - 1) / step * step; }

// An adapter as the kernel will read it: ``rows`` of ``columns`` contiguous 16-bit elements.
struct Adapter {
  const void* base;
  uint32_t rows, columns;
  int64_t stride, stride_column;
  bool packed;

  // ``stride`` is that of the rows.
  Adapter(const void* base, int64_t rows, int64_t columns, int64_t stride, int64_t stride_column, bool is_float)
      : base(base),
        rows(rows),
        columns(columns),
        stride(stride),
        stride_column(stride_column),
        packed(is_float || stride_column != 1 || stride < columns || !is_aligned(base, stride)) {}

  uint32_t padded() const { return round_up(columns, 8); }
  size_t bytes() const { return packed ? round_up(size_t(rows) * padded() * 2, 256) : 0; }
};

// The memory of a call beside its operands: what is packed, then two counters and the flags.
struct Plan {
  Adapter a, b;
  uint32_t row_blocks;

  explicit Plan(const fastlora_lora_matmul& c)
      : a(c.w_transposed ? Adapter(c.a, c.k, c.r, c.a_stride_k, c.a_stride_r, c.adapter_dtype == FASTLORA_FP32)
                         : Adapter(c.a, c.r, c.k, c.a_stride_r, c.a_stride_k, c.adapter_dtype == FASTLORA_FP32)),
        b(c.w_transposed ? Adapter(c.b, c.r, c.n, c.b_stride_r, c.b_stride_n, c.adapter_dtype == FASTLORA_FP32)
                         : Adapter(c.b, c.n, c.r, c.b_stride_n, c.b_stride_r, c.adapter_dtype == FASTLORA_FP32)),
        row_blocks(ceil_div(c.m, TILE_M)) {
    if (c.w == nullptr) b.packed = false;
  }

  size_t sync_bytes() const { return 4 * (2 + size_t(row_blocks)); }
  size_t bytes() const { return a.bytes() + b.bytes() + sync_bytes(); }
};

// The tile with the best arithmetic intensity, unless it leaves more than half of the GPU without one.
uint32_t choose_tile_columns(const fastlora_lora_matmul& c, uint32_t sms) {
  if (c.tile_columns != 0) return c.tile_columns;
  if (c.r > 2 * PANEL) return 256;
  const uint64_t tiles = uint64_t(ceil_div(c.m, TILE_M)) * ceil_div(c.n, 256);
  return c.n > 128 && 2 * tiles > sms ? 256 : 128;
}

template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
const char* launch_tiles(Parameters& p, bool tiles, bool serial, uint32_t sms, void* stream) {
  const auto kernel = lora_matmul_kernel<T, TILE_N, CLUSTER, TRANSPOSED>;
  LaunchShape shape = {};
  shape.threads = THREADS;
  shape.cluster = CLUSTER;
  shape.shared_bytes = Layout<TILE_N>::BYTES;
  const auto run = [&](bool z, bool y) {
    p.schedule = make_schedule(p.m, p.n, TILE_N, CLUSTER, z, y, sms);
    const uint32_t clusters = sms / CLUSTER > 0 ? sms / CLUSTER : 1;
    shape.blocks_x = CLUSTER * (p.schedule.jobs() < clusters ? p.schedule.jobs() : clusters);
    shape.dependent = y && !z;
    return launch(+kernel, p, shape, stream);
  };
  if (!tiles || !serial) return run(true, tiles);
  uint32_t* const flags = p.flags;
  p.flags = nullptr;
  if (const char* error = run(true, false)) return error;
  p.counter = flags - 1;
  return run(false, true);
}

template <class T>
const char* run_lora_matmul(const fastlora_lora_matmul& c, void* workspace, uint32_t sms, void* stream) {
  const Plan plan(c);
  const bool tiles = c.w != nullptr;
  const uint32_t tile_n = tiles ? choose_tile_columns(c, sms) : 256;
  const bool pairs = tile_n == 256 && plan.row_blocks > 1;
  uint8_t* memory = static_cast<uint8_t*>(workspace);

  Parameters p = {};
  p.bias = c.bias;
  p.z_out = c.z;
  p.z_stride = c.z_stride;
  p.m = c.m, p.n = c.n, p.k = c.k, p.r = c.r;
  p.z_columns = round_up(c.r, 8);
  p.scale = c.mask.kind == FASTLORA_MASK_INPUT ? c.scale * c.mask.rescale : c.scale;
  p.mask_kind = c.mask.kind;
  p.mask = {c.mask.seed, c.mask.threshold, c.mask.rescale};

  PackParameters packing = {};
  const void* adapters[2] = {plan.a.base, plan.b.base};
  uint32_t most = 0;
  for (int i = 0; i < 2; ++i) {
    const Adapter& q = i == 0 ? plan.a : plan.b;
    if (!q.packed) continue;
    adapters[i] = memory;
    packing.packing[i] = {q.base,          reinterpret_cast<uint16_t*>(memory), q.rows, q.columns, q.padded(), q.stride,
                          q.stride_column, c.adapter_dtype == FASTLORA_FP32};
    most = q.rows * q.padded() > most ? q.rows * q.padded() : most;
    memory += q.bytes();
  }
  p.counter = reinterpret_cast<uint32_t*>(memory);
  p.flags = p.counter + 2;
  if (const char* error = set_zero(p.counter, plan.sync_bytes(), stream)) return error;
  if (most > 0) {
    LaunchShape shape = {};
    shape.blocks_x = ceil_div(most, 4 * PACK_THREADS);
    shape.threads = PACK_THREADS;
    if (const char* error = launch(+pack_kernel<T>, packing, shape, stream)) return error;
  }

  // Boxes as the producer's loads have them: x and z whole blocks of rows, w and b this CTA's share, y half a block.
  const uint32_t share = c.w_transposed ? PANEL : tile_n / (pairs ? 2 : 1);
  const auto row_bytes = [](const Adapter& q) { return 2 * (q.packed ? q.padded() : q.stride); };
  const char* error = make_map(&p.x, c.x, c.m, c.k, 2 * c.x_stride, TILE_M);
  if (!error) error = make_map(&p.a, adapters[0], plan.a.rows, plan.a.columns, row_bytes(plan.a), PANEL);
  if (tiles) {
    const uint64_t w_rows = c.w_transposed ? c.k : c.n, w_columns = c.w_transposed ? c.n : c.k;
    if (!error) error = make_map(&p.w, c.w, w_rows, w_columns, 2 * c.w_stride, share);
    if (!error) error = make_map(&p.b, adapters[1], plan.b.rows, plan.b.columns, row_bytes(plan.b), share);
    if (!error) error = make_map(&p.z, c.z, c.m, c.r, 2 * c.z_stride, TILE_M);
    if (!error) error = make_map(&p.y, c.y, c.m, c.n, 2 * c.y_stride, CONSUMER_ROWS);
  }
  if (error) return error;

  const bool serial = c.design == FASTLORA_SERIAL;
  if (c.w_transposed) {
    return tile_n == 128 ? launch_tiles<T, 128, 1, true>(p, tiles, serial, sms, stream)
           : pairs       ? launch_tiles<T, 256, 2, true>(p, tiles, serial, sms, stream)
                         : launch_tiles<T, 256, 1, true>(p, tiles, serial, sms, stream);
  }
  return tile_n == 128 ? launch_tiles<T, 128, 1, false>(p, tiles, serial, sms, stream)
         : pairs       ? launch_tiles<T, 256, 2, false>(p, tiles, serial, sms, stream)
                       : launch_tiles<T, 256, 1, false>(p, tiles, serial, sms, stream);
}

const char* refusal(const fastlora_lora_matmul& c) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  if (c.m < 1 || c.k < 1 || c.r < 1 || (c.w && c.n < 1)) return "lora_matmul: m, k, n and r must be at least 1";
  if (c.m >= LIMIT || c.k >= LIMIT || c.n >= LIMIT) return "lora_matmul: m, k and n must be below 2^31";
  if (c.r > 256) return "lora_matmul: r must be at most 256";
  if (c.dtype != FASTLORA_BF16 && c.dtype != FASTLORA_FP16) return "lora_matmul: dtype must be BF16 or FP16";
  if (c.adapter_dtype != c.dtype && c.adapter_dtype != FASTLORA_FP32) {
    return "lora_matmul: adapter_dtype must be dtype or FP32";
  }
  if (!is_aligned(c.x, c.x_stride)) return "lora_matmul: rows of x must start on 16 bytes";
  if (!is_aligned(c.z, c.z_stride) || c.z_stride < int64_t(round_up(c.r, 8)))
    return "lora_matmul: rows of z must start on 16 bytes";
  if (c.w == nullptr) return nullptr;
  if (!is_aligned(c.w, c.w_stride)) return "lora_matmul: rows of w must start on 16 bytes";
  if (!is_aligned(c.y, c.y_stride)) return "lora_matmul: rows of y must start on 16 bytes";
  if (c.n % 8 != 0) return "lora_matmul: n must be a multiple of 8, so that rows of y are whole 16 bytes";
  if (c.tile_columns != 0 && c.tile_columns != 128 && c.tile_columns != 256) {
    return "lora_matmul: tile_columns must be 0, 128 or 256";
  }
  if (c.tile_columns == 128 && c.r > 2 * PANEL) return "lora_matmul: tiles of 128 columns take r up to 128";
  return nullptr;
}

}  // namespace
}  // namespace fastlora

extern "C" int32_t fastlora_abi(void) { return FASTLORA_ABI; }

extern "C" const char* fastlora_kernels(void) {
  using namespace fastlora;
  static char lines[512];
  std::snprintf(lines, sizeof(lines),
                "lora_matmul_kernel<*, 128, *> %u %u 1\n"
                "lora_matmul_kernel<*, 256, *> %u %u 1\n"
                "pack_kernel<*> %u 0 0\n%s",
                THREADS, Layout<128>::BYTES, THREADS, Layout<256>::BYTES, PACK_THREADS, rank_grad_kernels());
  return lines;
}

extern "C" size_t fastlora_lora_matmul_workspace(const fastlora_lora_matmul* call) {
  return fastlora::Plan(*call).bytes();
}

extern "C" const char* fastlora_lora_matmul_sm90(const fastlora_lora_matmul* call, void* workspace, int32_t sms,
                                                 void* stream) {
  using namespace fastlora;
  if (const char* reason = refusal(*call)) return reason;
  return call->dtype == FASTLORA_BF16 ? run_lora_matmul<BF16>(*call, workspace, sms, stream)
                                      : run_lora_matmul<FP16>(*call, workspace, sms, stream);
}
