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
//                                                y_mn <- acc_mn + bias_n, 64 columns at a time through shared memory
//
// The low-rank product is one more trip of the same ring for each 64 of rank, of which it multiplies ceil(R / 16)
// steps.
// Operands: x [M, K], y [M, N], z [M, R] 16-bit, rows of whole 16 bytes; w [N, K] or stored [K, N]; a, b as w, packed
// by the launch before where they are float32 or their rows are not whole 16 bytes; R <= 256.
// Bytes: the frozen product's, plus one read of x by the z jobs, on a few CTAs beside the tiles of the others.
// Designs: Z_JOBS as above; SERIAL makes z in a launch of z jobs alone, and the launch of tiles depends on it.
// Launches: prepare, which clears the counter and the flags and packs, then one that depends on it, or SERIAL's two.

#include <cstdint>
#include <cstdio>

#include <fastlora.h>
#include <kernels.cuh>
#include <layout.cuh>
#include <lora_matmul_consumer.cuh>
#include <lora_matmul_producer.cuh>
#include <philox.cuh>
#include <pipeline.cuh>
#include <prepare.cuh>
#include <ptx.cuh>
#include <schedule.cuh>

#include <launch.cuh>

namespace fastlora::lora_matmul {
namespace {

template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1) lora_matmul_kernel(const __grid_constant__ Parameters p) {
  using L = Layout<TILE_N>;
  const Shared memory = shared_memory();
  const Ring<L::STAGES, L::STAGE_BYTES, CLUSTER> ring(memory, memory + L::BARRIERS);
  const JobQueue<CLUSTER> jobs(memory + L::JOBS);
  const uint32_t warp = warp_index();
  if (warp == 0 && elect_one()) {
    ring.initialise();
    jobs.initialise();
    fence_barrier_init();
    prefetch_map(&p.x);
    if (p.schedule.columns > 0) prefetch_map(&p.w);
  }
  warp_sync();
  if (CLUSTER > 1) {
    cluster_sync_initialised();
  } else {
    cta_sync();
  }
  if (warp < WARPGROUP / 32) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (warp == 0 && elect_one()) Producer<TILE_N, CLUSTER, TRANSPOSED>{p, ring, jobs}.run();
    warp_sync();
  } else {
    registers_increase<CONSUMER_REGISTERS>();
    Consumer<T, TILE_N, CLUSTER, TRANSPOSED>{p, ring, jobs, memory + L::Y, warp / 4 - 1}.run();
  }
  // Until both CTAs have arrived, the other may still write into this one's shared memory.
  if (CLUSTER > 1) cluster_sync();
}

// Whether w is stored as [k, n].
bool is_transposed(const fastlora_lora_matmul& c) { return c.w.data != nullptr && c.w.column_stride != 1; }

// The workspace of a call: packed adapters, then a counter per launch and the flags.
struct Plan {
  static constexpr uint32_t MOST_LAUNCHES = 2;
  Adapter a, b;
  uint32_t row_blocks;

  explicit Plan(const fastlora_lora_matmul& c)
      : a(is_transposed(c) ? Adapter(transposed(c.a), c.k, c.r, c.adapter_dtype == FASTLORA_FP32)
                           : Adapter(c.a, c.r, c.k, c.adapter_dtype == FASTLORA_FP32)),
        b(is_transposed(c) ? Adapter(transposed(c.b), c.r, c.n, c.adapter_dtype == FASTLORA_FP32)
                           : Adapter(c.b, c.n, c.r, c.adapter_dtype == FASTLORA_FP32)),
        row_blocks(ceil_div(c.m, TILE_M)) {
    if (c.w.data == nullptr) b.packed = false;
  }

  size_t sync_bytes() const { return 4 * (MOST_LAUNCHES + size_t(row_blocks)); }
  size_t bytes() const { return a.bytes() + b.bytes() + sync_bytes(); }
};

// The tile with the best arithmetic intensity, unless it leaves more than half of the GPU without one.
uint32_t choose_tile_columns(const fastlora_lora_matmul& c, uint32_t sms) {
  if (c.tile_columns != 0) return c.tile_columns;
  if (c.r > 2 * PANEL) return 256;
  const uint64_t tiles = uint64_t(ceil_div(c.m, TILE_M)) * ceil_div(c.n, 256);
  return c.n > 128 && 2 * tiles > sms ? 256 : 128;
}

// Whether two CTAs share each tile of w's columns: a cluster.
bool runs_in_pairs(const fastlora_lora_matmul& c, uint32_t tile_columns) {
  return tile_columns == 256 && ceil_div(c.m, TILE_M) > 1;
}

// z jobs and tiles in one launch, or z jobs in one and tiles in the next.
template <class T, int TILE_N, int CLUSTER, bool TRANSPOSED>
const char* launch_jobs(Parameters& p, bool makes_tiles, bool serial, uint32_t sms, void* stream) {
  const auto kernel = lora_matmul_kernel<T, TILE_N, CLUSTER, TRANSPOSED>;
  LaunchShape shape = {};
  shape.threads = THREADS;
  shape.cluster = CLUSTER;
  shape.shared_bytes = Layout<TILE_N>::BYTES;
  shape.dependent = true;
  const auto run = [&](bool makes_z, bool makes_tiles) {
    p.schedule = make_schedule(p.m, p.n, TILE_N, CLUSTER, makes_z, makes_tiles, sms);
    const uint32_t clusters = sms / CLUSTER > 0 ? sms / CLUSTER : 1;
    shape.blocks_x = CLUSTER * (p.schedule.jobs() < clusters ? p.schedule.jobs() : clusters);
    return launch(+kernel, p, shape, stream);
  };
  if (!makes_tiles || !serial) return run(true, makes_tiles);
  p.flags = nullptr;
  if (const char* error = run(true, false)) return error;
  p.counter += 1;  // each launch takes jobs from its own
  return run(false, true);
}

template <class T>
const char* run_lora_matmul(const fastlora_lora_matmul& c, void* workspace, uint32_t sms, void* stream) {
  const Plan plan(c);
  const bool makes_tiles = c.w.data != nullptr;
  const uint32_t tile_n = makes_tiles ? choose_tile_columns(c, sms) : 256;
  const bool pairs = runs_in_pairs(c, tile_n);
  uint8_t* memory = static_cast<uint8_t*>(workspace);

  Parameters p = {};
  p.bias = c.bias;
  p.z_out = c.z.data;
  p.z_stride = c.z.row_stride;
  p.m = c.m, p.n = c.n, p.k = c.k, p.r = c.r;
  p.z_columns = round_up(c.r, 8);
  p.scale = c.mask.kind == FASTLORA_MASK_INPUT ? c.scale * c.mask.rescale : c.scale;
  p.mask_kind = c.mask.kind;
  p.mask = {c.mask.seed, c.mask.threshold, c.mask.rescale};

  Preparation preparation = {};
  const void* adapters[2] = {plan.a.matrix.data, plan.b.matrix.data};
  for (int i = 0; i < 2; ++i) {
    const Adapter& q = i == 0 ? plan.a : plan.b;
    if (!q.packed) continue;
    adapters[i] = memory;
    preparation.packing[i] = {q.matrix.data,
                              reinterpret_cast<uint16_t*>(memory),
                              q.rows,
                              q.columns,
                              q.padded(),
                              q.matrix.row_stride,
                              q.matrix.column_stride,
                              q.is_float};
    memory += q.bytes();
  }
  p.counter = reinterpret_cast<uint32_t*>(memory);
  p.flags = p.counter + Plan::MOST_LAUNCHES;
  preparation.words = p.counter;
  preparation.count = plan.sync_bytes() / 4;

  // Boxes as the producer loads them: x and z whole blocks of rows, w and b this CTA's share, y half a block.
  const bool w_transposed = is_transposed(c);
  const uint32_t share = w_transposed ? PANEL : tile_n / (pairs ? 2 : 1);
  const auto row_bytes = [](const Adapter& q) { return 2 * (q.packed ? q.padded() : q.matrix.row_stride); };
  const char* error = make_map(&p.x, c.x.data, c.m, c.k, 2 * c.x.row_stride, TILE_M);
  if (!error) error = make_map(&p.a, adapters[0], plan.a.rows, plan.a.columns, row_bytes(plan.a), PANEL);
  if (makes_tiles) {
    const fastlora_matrix w = w_transposed ? transposed(c.w) : c.w;
    const uint64_t w_rows = w_transposed ? c.k : c.n, w_columns = w_transposed ? c.n : c.k;
    if (!error) error = make_map(&p.w, w.data, w_rows, w_columns, 2 * w.row_stride, share);
    if (!error) error = make_map(&p.b, adapters[1], plan.b.rows, plan.b.columns, row_bytes(plan.b), share);
    if (!error) error = make_map(&p.z, c.z.data, c.m, c.r, 2 * c.z.row_stride, TILE_M);
    if (!error) error = make_map(&p.y, c.y.data, c.m, c.n, 2 * c.y.row_stride, CONSUMER_ROWS);
  }
  if (!error) error = prepare<T>(preparation, stream);
  if (error) return error;

  const bool serial = c.design == FASTLORA_SERIAL;
  if (w_transposed) {
    return tile_n == 128 ? launch_jobs<T, 128, 1, true>(p, makes_tiles, serial, sms, stream)
           : pairs       ? launch_jobs<T, 256, 2, true>(p, makes_tiles, serial, sms, stream)
                         : launch_jobs<T, 256, 1, true>(p, makes_tiles, serial, sms, stream);
  }
  return tile_n == 128 ? launch_jobs<T, 128, 1, false>(p, makes_tiles, serial, sms, stream)
         : pairs       ? launch_jobs<T, 256, 2, false>(p, makes_tiles, serial, sms, stream)
                       : launch_jobs<T, 256, 1, false>(p, makes_tiles, serial, sms, stream);
}

const char* refusal(const fastlora_lora_matmul& c) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  const bool makes_tiles = c.w.data != nullptr;
  if (c.m < 1 || c.k < 1 || c.r < 1 || (makes_tiles && c.n < 1)) {
    return "lora_matmul: m, k, n and r must be at least 1";
  }
  if (c.m >= LIMIT || c.k >= LIMIT || (makes_tiles && c.n >= LIMIT)) {
    return "lora_matmul: m, k and n must be below 2^31";
  }
  if (c.r > 256) return "lora_matmul: r must be at most 256";
  if (c.dtype != FASTLORA_BF16 && c.dtype != FASTLORA_FP16) return "lora_matmul: dtype must be BF16 or FP16";
  if (c.adapter_dtype != c.dtype && c.adapter_dtype != FASTLORA_FP32) {
    return "lora_matmul: adapter_dtype must be dtype or FP32";
  }
  if (!has_aligned_rows(c.x)) return "lora_matmul: rows of x must be contiguous and start on 16 bytes";
  if (!has_aligned_rows(c.z) || c.z.row_stride < int64_t(round_up(c.r, 8))) {
    return "lora_matmul: rows of z must be contiguous and start on 16 bytes";
  }
  if (!makes_tiles) return nullptr;
  if (!has_aligned_rows(is_transposed(c) ? transposed(c.w) : c.w)) {
    return "lora_matmul: rows of w, or of its transpose, must be contiguous and start on 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(c.bias) % 4 != 0) return "lora_matmul: bias must start on 4 bytes";
  if (!has_aligned_rows(c.y)) return "lora_matmul: rows of y must be contiguous and start on 16 bytes";
  if (c.n % 8 != 0) return "lora_matmul: n must be a multiple of 8, so that rows of y are whole 16 bytes";
  if (c.tile_columns != 0 && c.tile_columns != 128 && c.tile_columns != 256) {
    return "lora_matmul: tile_columns must be 0, 128 or 256";
  }
  if (c.tile_columns == 128 && c.r > 2 * PANEL) return "lora_matmul: tiles of 128 columns take r up to 128";
  return nullptr;
}

}  // namespace

const char* kernels() {
  static char lines[256];
  std::snprintf(lines, sizeof(lines),
                "lora_matmul_kernel<*, 128, 1, *> %u %u 1 1\n"
                "lora_matmul_kernel<*, 256, 1, *> %u %u 1 1\n"
                "lora_matmul_kernel<*, 256, 2, *> %u %u 1 2\n"
                "prepare_kernel<*> %u 0 0 1\n",
                THREADS, Layout<128>::BYTES, THREADS, Layout<256>::BYTES, THREADS, Layout<256>::BYTES, PREPARE_THREADS);
  return lines;
}

}  // namespace fastlora::lora_matmul

extern "C" size_t fastlora_lora_matmul_workspace(const fastlora_lora_matmul* call) {
  return fastlora::lora_matmul::Plan(*call).bytes();
}

extern "C" const char* fastlora_lora_matmul_tile(const fastlora_lora_matmul* call, int32_t device) {
  using namespace fastlora;
  using namespace fastlora::lora_matmul;
  thread_local char words[64];
  uint32_t sms;
  if (call->w.data == nullptr || count_multiprocessors(device, &sms) != nullptr) return nullptr;
  const uint32_t columns = choose_tile_columns(*call, sms);
  std::snprintf(words, sizeof(words), "%dx%ux%d, clusters of %d", TILE_M, columns, PANEL,
                runs_in_pairs(*call, columns) ? 2 : 1);
  return words;
}

extern "C" const char* fastlora_lora_matmul_sm90(const fastlora_lora_matmul* call, void* workspace, int32_t device,
                                                 void* stream) {
  using namespace fastlora;
  using namespace fastlora::lora_matmul;
  if (const char* reason = refusal(*call)) return reason;
  if (const char* error = use_device(device)) return error;
  uint32_t sms;
  if (const char* error = count_multiprocessors(device, &sms)) return error;
  return call->dtype == FASTLORA_BF16 ? run_lora_matmul<BF16>(*call, workspace, sms, stream)
                                      : run_lora_matmul<FP16>(*call, workspace, sms, stream);
}
