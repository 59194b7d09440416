// Small kernels that tests/csrc/test_host_model.py runs on the model, each with faults that it plants by name.
#include <cstring>

#include <layout.cuh>
#include <ptx.cuh>

#include <launch.cuh>

namespace fastlora {
namespace {

struct Fault {
  const char* name;

  bool is(const char* other) const { return std::strcmp(name, other) == 0; }
};

// ---- A box of a matrix into shared memory, from there word by word into ``raw``, and back out by the copy engine

struct CopyParameters {
  TensorMap from, to;
  int32_t c0, c1, to_c0, to_c1;
  uint32_t bytes;
  uint32_t* raw;
  Fault fault;
};

__global__ void copy_kernel(const __grid_constant__ CopyParameters p) {
  const Fault& fault = p.fault;
  const Shared box = shared_memory() + (fault.is("box not aligned") ? 128 : 0);
  const Shared barrier = shared_memory() + p.bytes + 1024;
  if (elect_one()) {
    if (!fault.is("barrier not initialised")) barrier_init(barrier, fault.is("too many arrivals") ? 2 : 1, "landed", 7);
    if (fault.is("barrier initialised twice")) barrier_init(barrier, 1, "again");
    if (!fault.is("barrier not fenced")) fence_barrier_init();
    const uint32_t wrong = fault.is("too few bytes") ? -128 : fault.is("too many bytes") ? 128 : 0;
    barrier_arrive_expect(barrier, p.bytes + wrong);
    tma_load(box, &p.from, barrier, p.c0, p.c1);
    if (fault.is("loaded twice")) tma_load(box, &p.from, barrier, p.c0, p.c1);
    if (fault.is("arrives twice")) barrier_arrive(barrier);
    if (fault.is("writes over the barrier")) store_shared(barrier + 4, 1);
  }
  warp_sync();
  if (!fault.is("not waited for")) barrier_wait(barrier, fault.is("wrong parity") ? 1 : 0);
  for (uint32_t at = 4 * thread_index(); at < p.bytes; at += 4 * 32) p.raw[at / 4] = load_shared(box + at);
  warp_sync();
  if (elect_one()) {
    tma_store(&p.to, box, p.to_c0, p.to_c1);
    if (!fault.is("store not committed")) tma_store_commit();
    if (fault.is("written before the store has read")) store_shared(box, 0);
    if (!fault.is("store not waited for")) tma_store_wait_all();
  }
}

// ---- out [64, N] = A · B, 64 k in steps of 16, by descriptors as the caller wants them

struct ProductParameters {
  TensorMap a, b;
  float* out;
  uint32_t b_boxes;
  // Of the descriptors: offsets in bytes, and bits 62-63.
  uint32_t a_leading, a_stride, b_leading, b_stride, swizzle;
  // Threads double A in place before.
  bool doubled;
  Fault fault;
};

uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, uint32_t swizzle) {
  return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}

template <class T, int N, bool A_MN, bool B_MN>
__global__ void product_kernel(const __grid_constant__ ProductParameters p) {
  constexpr uint32_t A_BYTES = 64 * 128, B_BYTES = N * 128;
  const Fault& fault = p.fault;
  const Shared a = shared_memory(), b = a + A_BYTES, barrier = b + B_BYTES;
  const uint32_t thread = thread_index();
  if (warp_index() == 0 && elect_one()) {
    barrier_init(barrier, 1, "landed");
    fence_barrier_init();
    barrier_arrive_expect(barrier, A_BYTES + B_BYTES);
    tma_load(a, &p.a, barrier, 0, 0);
    for (uint32_t i = 0; i < p.b_boxes; ++i) tma_load(b + i * 64 * 128, &p.b, barrier, 64 * i, 0);
  }
  cta_sync();
  barrier_wait(barrier, 0);
  if (p.doubled) {
    for (uint32_t at = 16 * thread; at < A_BYTES; at += 16 * 128) {
      Words4 x = load_shared4(a + at);
      for (uint32_t& word : x.w) {
        word = T::pack(2 * T::widen(static_cast<uint16_t>(word)), 2 * T::widen(static_cast<uint16_t>(word >> 16)));
      }
      store_shared4(a + at, x);
    }
    if (!fault.is("no fence_async_shared")) fence_async_shared();
    cta_sync();
  }
  float d[N / 2];
  if (!fault.is("no wgmma_fence")) wgmma_fence();
  for (uint32_t step = 0; step < 4; ++step) {
    const uint32_t other = fault.is("descriptors differ") && thread == 77 ? 32 : 0;
    const uint64_t a_bits = descriptor(a + step * k16_bytes<A_MN>() + other, p.a_leading, p.a_stride, p.swizzle);
    const uint64_t b_bits = descriptor(b + step * k16_bytes<B_MN>(), p.b_leading, p.b_stride, p.swizzle);
    if (step == 0) {
      wgmma_set<T, N, A_MN, B_MN>(d, a_bits, b_bits);
    } else {
      wgmma_add<T, N, A_MN, B_MN>(d, a_bits, b_bits);
    }
  }
  wgmma_commit();
  if (fault.is("sums written before the wait")) d[3] = 0;
  if (fault.is("operand written before the wait") && thread == 0) store_shared(b, 0);
  if (!fault.is("sums read before the wait") && !fault.is("no wgmma_wait")) wgmma_wait<0>();
  for (uint32_t i = 0; i < N / 2; ++i) {
    const uint32_t row = 16 * (thread / 32) + 8 * (i / 2 % 2) + thread % 32 / 4;
    p.out[row * N + 8 * (i / 4) + 2 * (thread % 4) + i % 2] = d[i];
  }
  if (fault.is("sums read before the wait")) wgmma_wait<0>();
}

// ---- out [64, 64] = sum over trips of A · B through a ring of two slots: one producer thread, one consumer warpgroup

struct RingParameters {
  TensorMap a, b;
  float* out;
  uint32_t trips;
  Fault fault;
};

__global__ void ring_kernel(const __grid_constant__ RingParameters p) {
  constexpr uint32_t SLOTS = 2, OPERAND = 64 * 128;
  const Fault& fault = p.fault;
  const Shared memory = shared_memory(), full = memory + SLOTS * 2 * OPERAND, empty = full + 8 * SLOTS;
  const uint32_t warp = warp_index();
  if (warp == 0 && elect_one()) {
    for (uint32_t i = 0; i < SLOTS; ++i) {
      barrier_init(full + 8 * i, 1, "full", i);
      barrier_init(empty + 8 * i, 1, "empty", i);
    }
    fence_barrier_init();
  }
  cta_sync();
  if (warp < 4) {
    registers_decrease<40>();
    if (warp != 0 || !elect_one()) return;
    for (uint32_t trip = 0; trip < p.trips; ++trip) {
      const uint32_t slot = trip % SLOTS, lap = trip / SLOTS;
      const Shared to = memory + slot * 2 * OPERAND;
      if (!fault.is("slot not waited for")) barrier_wait(empty + 8 * slot, (lap + 1) & 1);
      barrier_arrive_expect(full + 8 * slot, 2 * OPERAND);
      tma_load(to, &p.a, full + 8 * slot, 64 * trip, 0);
      tma_load(to + OPERAND, &p.b, full + 8 * slot, 64 * trip, 0);
    }
    return;
  }
  float d[32] = {};
  const uint32_t thread = thread_index() - 128;
  const auto release = [&](uint32_t trip) {
    const uint32_t times = fault.is("slot never released") && trip == 1 ? 0 : fault.is("slot released twice") ? 2 : 1;
    for (uint32_t i = 0; thread == 0 && i < times; ++i) barrier_arrive(empty + 8 * (trip % SLOTS));
  };
  for (uint32_t trip = 0; trip < p.trips; ++trip) {
    const uint32_t slot = trip % SLOTS, lap = trip / SLOTS;
    const Shared a = memory + slot * 2 * OPERAND, b = a + OPERAND;
    barrier_wait(full + 8 * slot, (lap + (fault.is("wrong parity") && trip == 2)) & 1);
    wgmma_fence();
    for (uint32_t step = 0; step < 4; ++step) {
      wgmma_add<BF16, 64, false, false>(d, panel_descriptor(a + 32 * step, 0), panel_descriptor(b + 32 * step, 0));
    }
    wgmma_commit();
    if (fault.is("slot released before the wait")) release(trip);
    wgmma_wait<0>();
    if (!fault.is("slot released before the wait")) release(trip);
  }
  const Fragment fragment(thread);
  for (uint32_t i = 0; i < 32; ++i) {
    p.out[(fragment.row() + 8 * (i / 2 % 2)) * 64 + fragment.column() + 8 * (i / 4) + i % 2] = d[i];
  }
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

extern "C" const char* unit_copy(const void* from, void* to, int64_t rows, int64_t columns, int64_t row_bytes,
                                 uint32_t box_rows, int32_t c0, int32_t c1, int32_t to_c0, int32_t to_c1, uint32_t* raw,
                                 const char* fault) {
  CopyParameters p = {};
  if (const char* error = make_map(&p.from, from, rows, columns, row_bytes, box_rows)) return error;
  if (const char* error = make_map(&p.to, to, rows, columns, row_bytes, box_rows)) return error;
  p.c0 = c0, p.c1 = c1, p.to_c0 = to_c0, p.to_c1 = to_c1;
  p.bytes = box_rows * 128, p.raw = raw, p.fault = {fault};
  return launch(+copy_kernel, p, {1, 1, 32, 1, p.bytes + 1024 + 8}, nullptr);
}

template <class T, int N>
const char* run_product(const ProductParameters& p, bool a_mn, bool b_mn) {
  const auto kernel = a_mn ? (b_mn ? product_kernel<T, N, true, true> : product_kernel<T, N, true, false>)
                           : (b_mn ? product_kernel<T, N, false, true> : product_kernel<T, N, false, false>);
  return launch(kernel, p, {1, 1, 128, 1, 64 * 128 + N * 128 + 8}, nullptr);
}

template <class T>
const char* run_product(const ProductParameters& p, uint32_t n, bool a_mn, bool b_mn) {
  return n == 64    ? run_product<T, 64>(p, a_mn, b_mn)
         : n == 128 ? run_product<T, 128>(p, a_mn, b_mn)
                    : run_product<T, 256>(p, a_mn, b_mn);
}

// a [64, 64], of which the rows are k where MN-major; b [n, 64], or [64 k, n]. offsets: a_leading to swizzle.
extern "C" const char* unit_product(const void* a, const void* b, float* out, uint32_t n, bool a_mn, bool b_mn,
                                    bool fp16, bool doubled, const uint32_t* offsets, const char* fault) {
  ProductParameters p = {};
  if (const char* error = make_map(&p.a, a, 64, 64, 128, 64)) return error;
  const char* error = b_mn ? make_map(&p.b, b, 64, n, 2 * n, 64) : make_map(&p.b, b, n, 64, 128, n);
  if (error != nullptr) return error;
  p.out = out, p.b_boxes = b_mn ? n / 64 : 1, p.doubled = doubled, p.fault = {fault};
  p.a_leading = offsets[0], p.a_stride = offsets[1], p.b_leading = offsets[2], p.b_stride = offsets[3];
  p.swizzle = offsets[4];
  return fp16 ? run_product<FP16>(p, n, a_mn, b_mn) : run_product<BF16>(p, n, a_mn, b_mn);
}

// a and b [64, 64 trips]
extern "C" const char* unit_ring(const void* a, const void* b, float* out, uint32_t trips, const char* fault) {
  RingParameters p = {};
  if (const char* error = make_map(&p.a, a, 64, 64 * trips, 128 * trips, 64)) return error;
  if (const char* error = make_map(&p.b, b, 64, 64 * trips, 128 * trips, 64)) return error;
  p.out = out, p.trips = trips, p.fault = {fault};
  return launch(+ring_kernel, p, {1, 1, 256, 1, 4 * 64 * 128 + 32}, nullptr);
}

extern "C" void unit_round(const float* from, uint16_t* to, int64_t count, bool fp16) {
  for (int64_t i = 0; i < count; ++i) to[i] = fp16 ? FP16::round(from[i]) : BF16::round(from[i]);
}

extern "C" void unit_widen(const uint16_t* from, float* to, int64_t count, bool fp16) {
  for (int64_t i = 0; i < count; ++i) to[i] = fp16 ? FP16::widen(from[i]) : BF16::widen(from[i]);
}
