// rank_grad for sm_90a: g = pᵀ D(q), the gradient of an adapter; a tall-skinny reduction over the M tokens.
//
//   wide, narrow = the wider and the narrower of p and q        wide [M, C], narrow [M, R]
//   for each block of 128 columns of C, split of M:             one CTA
//     producer:   for 64 tokens of the split: ring <- wide_mc, narrow_mr
//     consumers:  acc_cr += D(wide_mc)ᵀ · narrow_mr             64 columns each
//                 partial[split] <- acc_cr
//     the last CTA of the columns:  g = sum of partial over splits, in order
//
// Operands: wide and narrow 16-bit, rows of whole 16 bytes; R <= 256; g in any dtype, any strides. The mask is on wide
// and is computed again. Both operands are read as stored, tokens outermost: wgmma takes both MN-major.
// Bytes: one read of wide, C / 128 of narrow (from L2), 8 · splits · C · R of partial sums. Memory-bound for R <= 64.
// The same bits run after run: the splits follow from the shapes, and the last CTA adds them in order.
// Launches: prepare, which clears the counts of ended splits, and one that depends on it; this alone where one split is.

#include <cstdint>
#include <cstdio>

#include <fastlora.h>
#include <kernels.cuh>
#include <layout.cuh>
#include <philox.cuh>
#include <pipeline.cuh>
#include <prepare.cuh>
#include <ptx.cuh>

#include <launch.cuh>

namespace fastlora::rank_grad {
namespace {

constexpr uint32_t COLUMNS = CONSUMERS * PANEL;
constexpr uint32_t TOKENS = 64;

// As many CTAs as fill an H100 or H200 once: a constant, so that the sums are the same on every GPU.
constexpr uint32_t TARGET_CTAS = 132;
// With fewer tokens per split the partial sums cost more than the reads.
constexpr uint32_t LEAST_TOKENS = 4 * TOKENS;

// Neighbours in memory that move at once: a row of partial sums has a multiple of 8.
struct alignas(8) Pair {
  float low, high;
};
struct alignas(16) Quad {
  float w[4];
};
constexpr uint32_t PIECE = 8;

struct Parameters {
  TensorMap wide, narrow;
  // [splits, c, r_padded] float32, and per block of columns the number of splits that have ended; NULL: there is one.
  float* partial;
  uint32_t* ended;
  void* grad;
  int64_t grad_stride_r, grad_stride_c;
  uint32_t m, c, r, r_padded;
  uint32_t tokens_per_split;
  int32_t grad_dtype;
  // Whether 8 r of grad lie side by side on 16 bytes.
  int32_t whole_pieces;
  int32_t masked;
  Mask mask;
};

// Shared memory of a CTA for R up to 64, 128 and 256 (PANELS = 1, 2, 4), in bytes:
//
//       64      128      256
//        0        0        0   8 stages of 24 KB, 6 of 32 KB, 4 of 48 KB: wide_mc and narrow_mr
//   196608   196608   196608   barriers of the stages
//   196736   196704   196672   whether this CTA is the last of its columns
//   196740   196708   196676   end
template <int PANELS>
struct Layout {
  static constexpr uint32_t STAGES = PANELS == 1 ? 8 : PANELS == 2 ? 6 : 4;
  static constexpr uint32_t STAGE_BYTES = (CONSUMERS + PANELS) * PANEL_64;
  using Ring = fastlora::Ring<STAGES, STAGE_BYTES>;

  static constexpr uint32_t BARRIERS = STAGES * STAGE_BYTES;
  static constexpr uint32_t LAST = BARRIERS + Ring::BARRIERS_BYTES;
  static constexpr uint32_t BYTES = LAST + 4;
  static_assert(BYTES <= MOST_SHARED_BYTES, "shared memory of a CTA");
};

template <int PANELS>
__device__ __forceinline__ void produce(const Parameters& p, typename Layout<PANELS>::Ring ring, uint32_t first_m,
                                        uint32_t last_m) {
  for (uint32_t m = first_m; m < last_m; m += TOKENS) {
    const Shared wide = ring.begin(Layout<PANELS>::STAGE_BYTES), narrow = wide + CONSUMERS * PANEL_64;
    for (uint32_t i = 0; i < CONSUMERS; ++i) {
      tma_load(wide + i * PANEL_64, &p.wide, ring.full(), block_index() * COLUMNS + i * PANEL, m);
    }
    for (uint32_t i = 0; i < PANELS; ++i) tma_load(narrow + i * PANEL_64, &p.narrow, ring.full(), i * PANEL, m);
    ring.advance();
  }
}

template <class T, int PANELS>
struct Consumer {
  using L = Layout<PANELS>;

  const Parameters& p;
  typename L::Ring ring;
  Shared last;
  uint32_t consumer;  // known to be the same in all lanes
  uint32_t thread = thread_index() % WARPGROUP;
  uint32_t first_c = block_index() * COLUMNS + consumer * PANEL;
  Fragment fragment = Fragment(thread);

  // acc_cr (+)= D(wide_mc)ᵀ · narrow_mr for the 64 tokens of the stage.
  template <bool SET>
  __device__ __forceinline__ void multiply(float (&acc_cr)[PANELS][PANEL / 2], uint32_t m) {
    ring.wait();
    const Shared wide = ring.stage() + consumer * PANEL_64, narrow = ring.stage() + CONSUMERS * PANEL_64;
    if (p.masked) {
      // In place: no other warpgroup reads these columns.
      mask_panel(MaskBits(p.mask), wide, 0, m, first_c, thread);
      fence_async_shared();
      named_barrier_sync(1 + consumer, WARPGROUP);
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
#pragma unroll
      for (uint32_t step = 0; step < TOKENS / 16; ++step) {
        const uint64_t wide_cm = panel_descriptor(wide + step * k16_bytes<true>(), PANEL_64);
        const uint64_t narrow_mr = panel_descriptor(narrow + i * PANEL_64 + step * k16_bytes<true>(), PANEL_64);
        if (SET && step == 0) {
          wgmma_set<T, PANEL, true, true>(acc_cr[i], wide_cm, narrow_mr);
        } else {
          wgmma_add<T, PANEL, true, true>(acc_cr[i], wide_cm, narrow_mr);
        }
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void run(uint32_t first_m, uint32_t last_m) {
    float acc_cr[PANELS][PANEL / 2];
    multiply<true>(acc_cr, first_m);
    ring.advance();
    for (uint32_t m = first_m + TOKENS; m < last_m; m += TOKENS) {
      multiply<false>(acc_cr, m);
      ring.release_previous();
      ring.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < PANELS; ++i) wgmma_settle(acc_cr[i]);
    store_partial(acc_cr);
    if (is_last()) add_splits();
  }

  __device__ __forceinline__ void store_partial(const float (&acc_cr)[PANELS][PANEL / 2]) const {
    const float rescale = p.masked ? p.mask.rescale : 1.0f;
    float* partial = p.partial + uint64_t(block_index_y()) * p.c * p.r_padded;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t c = first_c + fragment.row() + 8 * h;
      float* row = partial + uint64_t(c) * p.r_padded;
#pragma unroll
      for (int i = 0; i < PANELS; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t r = i * PANEL + 8 * j + fragment.column();
          if (c < p.c && r < p.r_padded) {
            *reinterpret_cast<Pair*>(row + r) = {acc_cr[i][4 * j + 2 * h] * rescale,
                                                 acc_cr[i][4 * j + 2 * h + 1] * rescale};
          }
        }
      }
    }
  }

  // One thread's addition releases what all consumers wrote, and acquires what those of the other splits wrote.
  __device__ __forceinline__ bool is_last() const {
    named_barrier_sync(1 + CONSUMERS, CONSUMERS * WARPGROUP);
    if (p.ended == nullptr) return true;
    if (consumer == 0 && thread == 0) {
      grid_dependency_wait();  // for the zeros
      store_shared(last, add_acquire_release(p.ended + block_index(), 1) + 1 == grid_blocks_y());
    }
    named_barrier_sync(1 + CONSUMERS, CONSUMERS * WARPGROUP);
    return load_shared(last) != 0;
  }

  // grad_rc <- sum over splits of partial, by this CTA's 128 columns. A piece is 8 neighbouring r of one column: 32 bytes
  // of each split. Neighbouring lanes take pieces that are neighbours in grad.
  __device__ __forceinline__ void add_splits() const {
    constexpr uint32_t AT_ONCE = 2;
    const uint32_t pieces = p.r_padded / PIECE, tid = consumer * WARPGROUP + thread;
    const bool along_c = p.grad_stride_c == 1;
    const uint64_t split_size = uint64_t(p.c) * p.r_padded;
    for (uint32_t first = tid; first < COLUMNS * pieces; first += AT_ONCE * CONSUMERS * WARPGROUP) {
      uint32_t c[AT_ONCE], r[AT_ONCE];
      const float* partial[AT_ONCE];
      bool there[AT_ONCE];
      float sum[AT_ONCE][PIECE] = {};
#pragma unroll
      for (uint32_t i = 0; i < AT_ONCE; ++i) {
        const uint32_t piece = first + i * CONSUMERS * WARPGROUP;
        const uint32_t column = along_c ? piece % COLUMNS : piece / pieces;
        c[i] = block_index() * COLUMNS + column;
        r[i] = PIECE * (along_c ? piece / COLUMNS : piece % pieces);
        there[i] = piece < COLUMNS * pieces && c[i] < p.c;
        partial[i] = p.partial + uint64_t(c[i]) * p.r_padded + r[i];
      }
#pragma unroll 4
      for (uint32_t split = 0; split < grid_blocks_y(); ++split) {
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
          if (!there[i]) continue;
          const Quad* quads = reinterpret_cast<const Quad*>(partial[i] + split * split_size);
          const Quad low = quads[0], high = quads[1];
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += low.w[j], sum[i][4 + j] += high.w[j];
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < AT_ONCE; ++i) {
        if (!there[i]) continue;
        if (p.grad_dtype == FASTLORA_FP32) {
          store_piece<float>(sum[i], r[i], c[i], [](float x) { return x; });
        } else if (p.grad_dtype == FASTLORA_BF16) {
          store_piece<uint16_t>(sum[i], r[i], c[i], BF16::round);
        } else {
          store_piece<uint16_t>(sum[i], r[i], c[i], FP16::round);
        }
      }
    }
  }

  template <class Element, class Round>
  __device__ __forceinline__ void store_piece(const float (&sum)[PIECE], uint32_t r, uint32_t c, Round round) const {
    struct alignas(16) Rounded {
      Element e[PIECE];
    } piece;
#pragma unroll
    for (uint32_t j = 0; j < PIECE; ++j) piece.e[j] = round(sum[j]);
    Element* to = static_cast<Element*>(p.grad) + r * p.grad_stride_r + c * p.grad_stride_c;
    if (p.whole_pieces && r + PIECE <= p.r) {
      *reinterpret_cast<Rounded*>(to) = piece;
      return;
    }
#pragma unroll
    for (uint32_t j = 0; j < PIECE; ++j) {
      if (r + j < p.r) to[j * p.grad_stride_r] = piece.e[j];
    }
  }
};

template <class T, int PANELS>
__global__ void __launch_bounds__(THREADS, 1) rank_grad_kernel(const __grid_constant__ Parameters p) {
  using L = Layout<PANELS>;
  const Shared memory = shared_memory();
  const typename L::Ring ring(memory, memory + L::BARRIERS);
  const uint32_t warp = warp_index();
  if (warp == 0 && elect_one()) {
    ring.initialise();
    fence_barrier_init();
    prefetch_map(&p.wide);
    prefetch_map(&p.narrow);
  }
  warp_sync();
  cta_sync();
  const uint32_t first_m = block_index_y() * p.tokens_per_split;
  const uint32_t last_m = p.m - first_m < p.tokens_per_split ? p.m : first_m + p.tokens_per_split;
  if (warp < WARPGROUP / 32) {
    registers_decrease<PRODUCER_REGISTERS>();
    if (warp == 0 && elect_one()) produce<PANELS>(p, ring, first_m, last_m);
  } else {
    registers_increase<CONSUMER_REGISTERS>();
    Consumer<T, PANELS>{p, ring, memory + L::LAST, warp / 4 - 1}.run(first_m, last_m);
  }
}

struct Plan {
  uint32_t blocks, splits, tokens_per_split, r_padded;

  explicit Plan(const fastlora_rank_grad& c) : blocks(ceil_div(c.c, COLUMNS)), r_padded(ceil_div(c.r, 8) * 8) {
    const uint32_t wanted = blocks < TARGET_CTAS ? TARGET_CTAS / blocks : 1, most = ceil_div(c.m, LEAST_TOKENS);
    tokens_per_split = ceil_div(ceil_div(c.m, wanted < most ? wanted : most), TOKENS) * TOKENS;
    splits = ceil_div(c.m, tokens_per_split);
  }

  size_t partial_bytes(const fastlora_rank_grad& c) const { return size_t(4) * splits * c.c * r_padded; }
  size_t bytes(const fastlora_rank_grad& c) const { return partial_bytes(c) + 4 * blocks; }
};

template <class T, int PANELS>
const char* launch_panels(const Parameters& p, const Plan& plan, void* stream) {
  LaunchShape shape = {};
  shape.dependent = p.ended != nullptr;
  shape.blocks_x = plan.blocks;
  shape.blocks_y = plan.splits;
  shape.threads = THREADS;
  shape.shared_bytes = Layout<PANELS>::BYTES;
  return launch(+rank_grad_kernel<T, PANELS>, p, shape, stream);
}

template <class T>
const char* run_rank_grad(const fastlora_rank_grad& c, void* workspace, void* stream) {
  const Plan plan(c);
  Parameters p = {};
  p.partial = static_cast<float*>(workspace);
  p.grad = c.grad.data;
  p.grad_stride_r = c.grad.row_stride;
  p.grad_stride_c = c.grad.column_stride;
  p.m = c.m, p.c = c.c, p.r = c.r, p.r_padded = plan.r_padded;
  p.tokens_per_split = plan.tokens_per_split;
  p.grad_dtype = c.grad_dtype;
  const int64_t element = c.grad_dtype == FASTLORA_FP32 ? 4 : 2;
  p.whole_pieces = c.grad.row_stride == 1 && c.grad.column_stride * element % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(c.grad.data) % 16 == 0;
  p.masked = c.mask.kind == FASTLORA_MASK_INPUT;
  p.mask = {c.mask.seed, c.mask.threshold, c.mask.rescale};
  if (const char* error = make_map(&p.wide, c.wide.data, c.m, c.c, 2 * c.wide.row_stride, TOKENS)) return error;
  if (const char* error = make_map(&p.narrow, c.narrow.data, c.m, c.r, 2 * c.narrow.row_stride, TOKENS)) return error;
  if (plan.splits > 1) {
    p.ended = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(workspace) + plan.partial_bytes(c));
    Preparation preparation = {};
    preparation.words = p.ended;
    preparation.count = plan.blocks;
    if (const char* error = prepare<T>(preparation, stream)) return error;
  }
  const uint32_t panels = ceil_div(c.r, PANEL);
  return panels == 1   ? launch_panels<T, 1>(p, plan, stream)
         : panels == 2 ? launch_panels<T, 2>(p, plan, stream)
                       : launch_panels<T, 4>(p, plan, stream);
}

const char* refusal(const fastlora_rank_grad& c) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  if (c.m < 1 || c.c < 1 || c.r < 1) return "rank_grad: m, c and r must be at least 1";
  if (c.m >= LIMIT || c.c >= LIMIT) return "rank_grad: m and c must be below 2^31";
  if (c.r > 256) return "rank_grad: r must be at most 256";
  if (c.dtype != FASTLORA_BF16 && c.dtype != FASTLORA_FP16) return "rank_grad: dtype must be BF16 or FP16";
  if (c.mask.kind == FASTLORA_MASK_PRODUCT) return "rank_grad: the mask is on wide, or there is none";
  if (!has_aligned_rows(c.wide)) return "rank_grad: rows of wide must be contiguous and start on 16 bytes";
  if (!has_aligned_rows(c.narrow)) return "rank_grad: rows of narrow must be contiguous and start on 16 bytes";
  return nullptr;
}

}  // namespace

const char* kernels() {
  static char lines[256];
  std::snprintf(lines, sizeof(lines),
                "rank_grad_kernel<*, 1> %u %u 1 1\n"
                "rank_grad_kernel<*, 2> %u %u 1 1\n"
                "rank_grad_kernel<*, 4> %u %u 1 1\n",
                THREADS, Layout<1>::BYTES, THREADS, Layout<2>::BYTES, THREADS, Layout<4>::BYTES);
  return lines;
}

}  // namespace fastlora::rank_grad

extern "C" size_t fastlora_rank_grad_workspace(const fastlora_rank_grad* call) {
  return fastlora::rank_grad::Plan(*call).bytes(*call);
}

extern "C" const char* fastlora_rank_grad_sm90(const fastlora_rank_grad* call, void* workspace, int32_t device,
                                               void* stream) {
  using namespace fastlora;
  using namespace fastlora::rank_grad;
  if (const char* reason = refusal(*call)) return reason;
  if (const char* error = use_device(device)) return error;
  return call->dtype == FASTLORA_BF16 ? run_rank_grad<BF16>(*call, workspace, stream)
                                      : run_rank_grad<FP16>(*call, workspace, stream);
}
